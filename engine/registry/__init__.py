"""What may be loaded: the catalogue as the registry of admitted models and add-ons, and the store their files come from. Torch-free."""
