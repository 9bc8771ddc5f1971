"""What is not in the paper: data, recipes, run folders, speed. A reader of the paper may skip this folder."""

from contextlib import contextmanager


@contextmanager
def explained(what):
    """For a `with` block: any error in it (foreign files fail in many ways) becomes a ValueError, "what (error)"."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from None
