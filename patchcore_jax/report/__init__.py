"""What people read of results: pages, tables, figures and pictures."""
