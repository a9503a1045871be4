"""The 1,797 handwritten digits of scikit-learn as the data of a job with images.

    pip download --no-deps scikit-learn==1.9.1
    python scripts/lib/digits.py scikit_learn-*.whl digits.bin

Nothing is installed: the table is read out of the wheel (or from a digits.csv.gz). A record is the
label, then 16 x 16 pixels of 0 to 240: each of the 8 x 8 pixels of 0 to 16 stands four times. The
records stand in a fixed shuffled order, so that what is held out at the end is like the rest.
"""

import argparse
import gzip
import zipfile
from pathlib import Path

from blake3 import blake3

MEMBER = "sklearn/datasets/data/digits.csv.gz"
SIDE, SCALE, COUNT = 8, 2, 1797


def records(table: bytes) -> list[bytes]:
    """The records in the order of the hashes of their places."""
    found = []
    for line in table.decode("ascii").split():
        *pixels, label = (int(float(word)) for word in line.split(","))
        if len(pixels) != SIDE * SIDE or max(pixels) > 16 or not 0 <= label <= 9:
            raise SystemExit("this is not the table of digits")
        rows = [pixels[at : at + SIDE] for at in range(0, SIDE * SIDE, SIDE)]
        wide = [bytes(15 * pixel for pixel in row for _ in range(SCALE)) for row in rows]
        found.append(bytes([label]) + b"".join(row for row in wide for _ in range(SCALE)))
    if len(found) != COUNT:
        raise SystemExit(f"{len(found)} digits, not {COUNT}")
    order = sorted(range(COUNT), key=lambda place: blake3(place.to_bytes(4, "big")).digest())
    return [found[place] for place in order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a wheel of scikit-learn, or digits.csv.gz")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.source.suffix == ".whl":
        with zipfile.ZipFile(arguments.source) as wheel:
            packed = wheel.read(MEMBER)
    else:
        packed = arguments.source.read_bytes()
    arguments.out.write_bytes(b"".join(records(gzip.decompress(packed))))


if __name__ == "__main__":
    main()
