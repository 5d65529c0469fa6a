"""The fine-tuning service: OpenAI's API, the provider's policy, the gate, evidence.

Nothing here imports torch at module level; the API process never does.
"""
