"""Short texts that several modules write: numbers, and errors in one line."""

from __future__ import annotations

import linecache
import re
import traceback
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def exact(value: float) -> str:
    """Write a number in the shortest form that reads back as the same number.

    Examples
    --------
    >>> exact(1e-3), exact(2.0), exact(0.00123456789)
    ('0.001', '2', '0.00123456789')
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def number(value: float) -> str:
    """Write a number with three decimal places, or with three digits where it is small.

    Examples
    --------
    >>> number(0.93426), number(0.000123), number(12.3456)
    ('0.934', '0.000123', '12.346')
    """
    return format(value, ".3f" if value == 0 or abs(value) >= 0.0995 else ".3g")


def brief(error: object) -> str:
    r"""Return one line of a recorded error: of a traceback the exception, else the first.

    Examples
    --------
    >>> brief("its process died: TerminatedWorkerError: A worker process was killed.\nDetailed tracebacks ...")
    'its process died: TerminatedWorkerError: A worker process was killed.'
    """
    lines = str(error).strip().splitlines() or [""]
    if not lines[0].startswith("Traceback"):
        return lines[0]
    # The exception follows the last frame, and may have several lines itself.
    frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    said = [line for line in lines[frames[-1] :] if not line.startswith(" ")] if frames else []
    return said[0] if said else lines[-1]


def last_frame(trace: str) -> str:
    r"""Return the last frame of the user's code in a recorded traceback, with its line.

    That is the innermost frame outside of installed packages, Python's own files and this
    package, or the innermost of all.

    Examples
    --------
    >>> last_frame('Traceback (most recent call last):\n  File "<here>", line 3, in loss\n    1 / 0\nZeroDivisionError')
    'File "<here>", line 3, in loss\n    1 / 0'
    """
    lines = trace.splitlines()
    frames = [i for i, line in enumerate(lines) if line.startswith('  File "')]
    if not frames:
        return ""
    users = [i for i in frames if _is_users(lines[i].split('"')[1])]
    chosen = (users or frames)[-1]
    code = lines[chosen + 1] if chosen + 1 < len(lines) and lines[chosen + 1].startswith("    ") else ""
    place = re.match(r'  File "(.+)", line (\d+)', lines[chosen])
    if not code and place:  # a worker that had the code without its file has left the line out
        code = f"    {linecache.getline(place[1], int(place[2])).strip()}".rstrip()
    return "\n".join(filter(None, [lines[chosen].strip(), code]))


def place_of(error: BaseException, name: str) -> str:
    """Return the line of the user's code that raised, as `my_task.py, line 3`.

    Parameters
    ----------
    name
        The file's name, where no frame tells more.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_shown(error.filename, name)}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f"{_shown(frames[-1].filename, name)}, line {frames[-1].lineno}" if frames else name


def _is_users(filename: str) -> bool:
    path = Path(filename)
    foreign = {"site-packages", "dist-packages"} & set(path.parts) or PACKAGE in path.parents
    return not foreign and path.is_file() and Path(linecache.__file__).parent not in path.parents


def _shown(filename: str, name: str) -> str:
    """Return the file as the user gave it, or another file by its last name."""
    return name if Path(filename).name == Path(name).name else Path(filename).name


def describe(error: BaseException) -> str:
    """Return `KeyError: 'a'`, in one line.

    Examples
    --------
    >>> describe(KeyError("a"))
    "KeyError: 'a'"
    """
    said = str(error.msg if isinstance(error, SyntaxError) else error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
