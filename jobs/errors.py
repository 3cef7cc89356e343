"""Errors a person caused and can mend; the command line prints them without a trace."""


class UserError(Exception):
    """Says what is wrong and what to do; ends the command with exit code 2."""


class RecipeError(UserError):
    """A recipe that cannot be used: says which file, key, value and reason, one problem a line."""


class RunError(Exception):
    """A run broke off, through no fault of the recipe; ends the command with exit code 1."""
