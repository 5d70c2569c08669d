"""Evidence for the CPU engine: training steps against the price of their products, against peers, and by operator."""
