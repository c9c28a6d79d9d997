"""Handlers of signals that are C functions: Python can neither install one nor put one back."""

import ctypes


def set_c_handler(number: int, handler: int | None) -> int | None:
    """Installs the C function at this address, None for the system's default, and returns the one before."""
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    return library.signal(number, handler)
