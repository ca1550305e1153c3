"""What a model costs: bytes by tensor class, loading, memory, speed, and money and energy from a price table."""
