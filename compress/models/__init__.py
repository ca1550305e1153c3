"""What is known of model architectures, and how a checkpoint is read without ever holding all of it."""
