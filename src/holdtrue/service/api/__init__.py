"""OpenAI's fine-tuning API over HTTP, field for field, and what a provider needs beside it."""
