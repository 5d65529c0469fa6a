"""Fine-tuning jobs: their states, who holds them, and what comes of them."""
