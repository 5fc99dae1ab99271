"""What operators and monitoring see: admin API, health, metrics."""
