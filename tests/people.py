"""A table as users have them, for the tests of what reads tables."""

import numpy as np
import pandas as pd

ROWS = 60


def people(rows=ROWS, seed=0):
    """A table with numbers, categories, yes and no, and holes in each."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "age": rng.integers(18, 80, rows),
            "income": rng.normal(3e4, 1e4, rows),
            "town": rng.choice(["Ulm", "Graz", "Bern"], rows),
            "member": rng.random(rows) < 0.5,
            "always": 7,
            "left": rng.choice(["yes", "no"], rows),
        }
    )
    frame.loc[rng.choice(rows, 8, replace=False), "income"] = np.nan
    frame.loc[rng.choice(rows, 8, replace=False), "town"] = None
    return frame


def written(frame, folder, name="people.csv", **options):
    path = folder / name
    frame.to_csv(path, index=False, **options)
    return str(path)
