"""What reproduces the papers: data, models, methods, recipes, measures and tables."""
