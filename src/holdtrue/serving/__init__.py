"""Chat with a base model and its adapters: the one long-lived process that holds a model."""
