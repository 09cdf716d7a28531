"""What is kept of a fit: its store, its description, where its patches come from, and how banks live on."""
