"""Parameter-efficient fine-tuning of vision transformers."""
