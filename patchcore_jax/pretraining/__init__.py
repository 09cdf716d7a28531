"""Training a backbone on procedural images; `experiments.pretrain` wires it. Nothing else needs it."""
