"""Masks of one's own, by whose import paths tests find them."""


def twice(signal, noise, hyper):
    """Return the snr mask with twice the softness."""
    return signal / (signal + 2 * hyper.softness * hyper.coefficient * noise + hyper.mask_eps)


NO_FUNCTION = 3
