class RecipeError(ValueError):
    """Something the user can put right; the message names the field, the value and the remedy."""
