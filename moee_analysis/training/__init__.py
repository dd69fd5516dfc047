"""Training: fine-tuning by distillation, and supervised."""
