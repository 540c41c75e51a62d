"""Pristine weights: copies that lie in a file, so that they take no memory that cannot be given back."""

import logging
import tempfile

import torch


def file_backed_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy of a flat tensor on the CPU, mapped from an unnamed temporary file (in TMPDIR).

    Its pages are read again from the file when they are needed, so the system can drop them at any time. Where the
    file cannot be written the copy lies in memory, with a warning.
    """
    source = tensor.detach().cpu().contiguous()
    if not len(source):
        return source.clone()
    try:
        with tempfile.NamedTemporaryFile(prefix="r1p-pristine-") as file:
            file.write(source.view(torch.uint8).numpy())
            file.flush()
            # shared=False: a private mapping, nothing can be written back
            return torch.from_file(file.name, shared=False, size=len(source), dtype=source.dtype)
    except OSError as error:
        logging.getLogger(__name__).warning("pristine weights stay in memory: %s: %s", tempfile.gettempdir(), error)
        return source.clone()
