"""CPU-seconds of each kind of stage, as the records of one or more stores say.

    python -m tests.benchmarks.bench_kinds [STORE ...]

With two stores of the same sweep (made on one machine, one by an older checkout) the columns stand
beside each other; kinds that an older version did in one stage have their own lines.
"""

from __future__ import annotations

import argparse
from collections import Counter

from ftsec_ray.store import Store


def seconds_of(store: str) -> Counter[str]:
    """Kind -> CPU-seconds of all its stages."""
    held = Store.open(store)
    seconds: Counter[str] = Counter()
    for record in held.records(held.done()).values():
        seconds[record["kind"]] += record["cpu_s"]
    return seconds


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stores", nargs="*", default=[".ftsec/store"])
    columns = [seconds_of(store) for store in parser.parse_args().stores]
    kinds = sorted({kind for column in columns for kind in column}, key=lambda k: -columns[-1][k])
    for kind in kinds:
        print(f"{kind:<10}", *(f"{column[kind]:>9.1f}" for column in columns))
    print(f"{'all':<10}", *(f"{column.total():>9.1f}" for column in columns))


if __name__ == "__main__":
    main()
