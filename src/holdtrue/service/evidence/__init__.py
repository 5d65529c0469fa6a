"""Evidence that travels with a model: a signed receipt, and a card for people."""
