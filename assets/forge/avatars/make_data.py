"""Renders the avatar data set: pictures as palette codes, attributes, held-out captions.

    python -m mmspec.assets.forge.avatars.make_data --work-dir build/avatars

Needs `node` and `npm` (DiceBear is installed into the work folder) and the Python package
`resvg_py`. Writes `data.npz`, `attributes.jsonl` and `data.json` (hashes, seed, versions) to the
work folder, and `heldout.jsonl`, `heldout_fresh.jsonl` and `palette.json` to `assets/avatars/`.
"""

import argparse
import hashlib
import importlib.metadata
import io
import json
import random
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from . import attributes as avatar
from .captions import BUNDLE, SEED, write_sets

HERE = Path(__file__).resolve().parent
SIZE = 16


def install_dicebear(work_dir: Path) -> dict[str, str]:
    """Installs DiceBear 9 in the work folder unless present; returns package versions."""
    modules = work_dir / "node_modules" / "@dicebear"
    if not modules.exists():
        (work_dir / "package.json").write_text('{"private": true}\n')
        packages = ["@dicebear/core@9", "@dicebear/collection@9"]
        subprocess.run(["npm", "install", "--no-fund", *packages], cwd=work_dir, check=True)
    versions = {}
    for name in ("core", "pixel-art"):
        package = json.loads((modules / name / "package.json").read_text())
        versions[f"@dicebear/{name}"] = package["version"]
    versions["resvg_py"] = importlib.metadata.version("resvg_py")
    return versions


def render(svg: str) -> bytes:
    """Renders one SVG at its native 16x16; returns 768 bytes of RGB, row by row."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    image = Image.open(io.BytesIO(png)).convert("RGB")
    if image.size != (SIZE, SIZE):
        raise ValueError(f"expected a {SIZE}x{SIZE} picture, but resvg drew {image.size}")
    return image.tobytes()


def draw(samples: list[avatar.Attributes], rng: random.Random, work_dir: Path) -> np.ndarray:
    """Draws one picture per attribute set; returns uint8 (N, 16, 16, 3)."""
    options = (json.dumps(avatar.dicebear_options(sample, rng)) for sample in samples)
    result = subprocess.run(
        ["node", str(HERE / "generate.mjs")],
        input="\n".join(options) + "\n",
        cwd=work_dir,
        check=True,
        capture_output=True,
        text=True,
    )
    svgs = [json.loads(line)["svg"] for line in result.stdout.splitlines()]
    if len(svgs) != len(samples):
        raise RuntimeError(f"asked for {len(samples)} avatars, but node returned {len(svgs)}")
    with ProcessPoolExecutor() as pool:
        rows = b"".join(pool.map(render, svgs, chunksize=500))
    return np.frombuffer(rows, np.uint8).reshape(-1, SIZE, SIZE, 3)


def find_palette(images: np.ndarray) -> np.ndarray:
    """Returns the distinct colours, the most frequent first, as uint8 (K, 3)."""
    colors, counts = np.unique(images.reshape(-1, 3), axis=0, return_counts=True)
    return colors[np.argsort(-counts, kind="stable")]


def to_codes(images: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Replaces each pixel by its palette index: (N, 16, 16, 3) -> uint8 (N, 256)."""
    weights = np.array([1 << 16, 1 << 8, 1])
    keys = palette.astype(np.int64) @ weights
    order = np.argsort(keys)
    pixels = images.reshape(-1, 3).astype(np.int64) @ weights
    found = order[np.searchsorted(keys[order], pixels).clip(max=len(keys) - 1)]
    if not (keys[found] == pixels).all():
        raise ValueError("a picture has a colour that is not in the palette")
    return found.astype(np.uint8).reshape(len(images), -1)


def exclusive_votes(codes: np.ndarray, samples: list[avatar.Attributes]) -> dict:
    """Finds, per attribute, the colours that occur with one single value of it.

    Returns:
        {attribute: {value: [palette indices]}}; the values "none" get no colours, they are what
        remains when no colour votes.
    """
    present = np.zeros((len(codes), int(codes.max()) + 1), bool)
    np.put_along_axis(present, codes.astype(np.int64), True, axis=1)
    votes: dict[str, dict[str, list[int]]] = {}
    for name in samples[0]:
        labels = np.array([sample[name] for sample in samples])
        seen = {v: present[labels == v].any(0) for v in sorted(set(labels))}
        total = np.sum(list(seen.values()), axis=0)
        votes[name] = {
            value: np.flatnonzero(mask & (total == 1)).tolist()
            for value, mask in seen.items()
            if value != "none"
        }
    return votes


def main() -> None:
    """Makes everything that the later steps read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--num-train", type=int, default=80_000)
    parser.add_argument("--num-test", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    BUNDLE.mkdir(parents=True, exist_ok=True)

    versions = install_dicebear(args.work_dir)
    rng = random.Random(args.seed)
    triples = avatar.heldout_triples(args.seed)
    train: list[avatar.Attributes] = []
    test: list[avatar.Attributes] = []
    while len(train) < args.num_train or len(test) < args.num_test:
        sample = avatar.draw_attributes(rng)
        split, size = (
            (test, args.num_test) if avatar.is_heldout(sample, triples) else (train, args.num_train)
        )
        if len(split) < size:
            split.append(sample)
    samples = train + test
    images = draw(samples, rng, args.work_dir)
    palette = find_palette(images)
    codes = to_codes(images, palette)
    np.savez_compressed(
        args.work_dir / "data.npz",
        train=codes[: len(train)],
        test=codes[len(train) :],
        palette=palette,
    )
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (args.work_dir / "attributes.jsonl").write_text(lines)

    heldout = write_sets(args.seed)
    table = {
        "colors": ["".join(f"{c:02x}" for c in color) for color in palette.tolist()],
        "votes": exclusive_votes(codes[: len(train)], train),
    }
    (BUNDLE / "palette.json").write_text(json.dumps(table) + "\n")
    record = {
        "num_train": len(train),
        "num_test": len(test),
        "num_colors": len(palette),
        "num_distinct_train_pictures": len(np.unique(codes[: len(train)], axis=0)),
        "seed": args.seed,
        "heldout_triples": sorted(triples),
        "versions": versions,
        "sha256": {
            "codes": hashlib.sha256(codes.tobytes()).hexdigest(),
            "palette": hashlib.sha256(palette.tobytes()).hexdigest(),
            "attributes": hashlib.sha256(lines.encode()).hexdigest(),
            **{name: hashlib.sha256(text.encode()).hexdigest() for name, text in heldout.items()},
        },
    }
    (args.work_dir / "data.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{len(train)}+{len(test)} avatars in {len(palette)} colours")


if __name__ == "__main__":
    main()
