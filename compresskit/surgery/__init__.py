"""Finding sites in a model, planning what becomes of each, and swapping them."""
