"""Networks that are trained: one loop for all of them, and the parts that several are made of."""
