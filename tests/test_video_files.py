import gc
import itertools
import json
import re
import subprocess
import sys
import tracemalloc
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from mmspec.video_files import FORMATS, open_video, read_video_metadata, save_video

METADATA = {"prompt": 'a "cät"\n=;#\\ end', "seed": 3, "settings": {"router": None}}


def formats(*without):
    """Formats as parameters; mp4 is skipped where the package is missing."""
    is_missing = find_spec("imageio_ffmpeg") is None
    skip = pytest.mark.skipif(is_missing, reason="needs imageio-ffmpeg")
    kinds = [kind for kind in FORMATS if kind not in without]
    return [pytest.param(kind, marks=skip if kind == "mp4" else ()) for kind in kinds]


def waves(num_frames=11, height=48, width=64):
    """A smooth moving picture, float32 [F, H, W, 3] in [0, 1]."""
    t, y, x = np.ogrid[:num_frames, :height, :width]
    parts = [np.sin((x + 2 * t) / 9 + c) * np.cos((y - t) / 7 + 2 * c) for c in range(3)]
    return (0.5 + 0.5 * np.stack(parts, -1)).astype(np.float32)


def as_bytes(frames):
    return (frames * 255).round().astype(np.uint8)


def pictures(*sizes):
    return list(map(Image.fromarray, as_bytes(waves(*sizes))))


def named(folder, kind):
    return folder / ("video" if kind == "frames" else f"video.{kind}")


def read_back(path):
    """Pictures [F, H, W, 3] and the milliseconds of each, by another reader."""
    if path.is_dir():
        images = [Image.open(file) for file in sorted(path.iterdir())]
        return np.stack([np.asarray(image) for image in images]), []
    if path.suffix == ".mp4":
        from imageio_ffmpeg import get_ffmpeg_exe

        # The matrix is the one that the file names; the default conversion rounds down.
        exactly = ["-vf", "scale=flags=accurate_rnd+full_chroma_int", "-pix_fmt", "rgb24"]
        command = [get_ffmpeg_exe(), "-i", str(path), *exactly, "-f", "rawvideo", "-"]
        done = subprocess.run(command, capture_output=True, check=True)
        said = done.stderr.decode()
        width, height = map(int, re.search(r", (\d+)x(\d+)", said).groups())
        fps = float(re.search(r"([\d.]+) fps", said)[1])
        pictures = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
        return pictures, [1000 / fps] * len(pictures)
    pictures, times = [], []
    with Image.open(path) as image:
        for number in range(image.n_frames):
            image.seek(number)
            image.load()
            times.append(image.info["duration"])
            pictures.append(np.asarray(image.convert("RGB")))
    return np.stack(pictures), times


# Mean and largest difference in grey levels. An mp4 read by another matrix has a mean of 7.8.
TOLERANCE = {"frames": (0, 0), "webp": (0, 0), "gif": (5, 25), "mp4": (1.6, 20)}


@pytest.mark.parametrize("kind", formats())
def test_what_is_read_back_is_what_was_written(tmp_path, kind):
    path = named(tmp_path, kind)
    frames = waves()
    save_video(frames, path, fps=16, metadata=METADATA)
    found, times = read_back(path)
    assert found.shape == frames.shape
    difference = np.abs(found.astype(int) - as_bytes(frames))
    mean, largest = TOLERANCE[kind]
    assert difference.mean() <= mean
    assert difference.max() <= largest
    if times:  # the shares of a second add up, whatever the format rounds to
        assert sum(times) == pytest.approx(1000 * len(frames) / 16, abs=5)
    assert read_video_metadata(path) == METADATA
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", formats())
def test_pictures_that_come_in_blocks_make_the_bytes_of_the_whole(tmp_path, kind):
    frames = waves(num_frames=9, height=16, width=16)
    whole, parts = named(tmp_path / "a", kind), named(tmp_path / "b", kind)
    save_video(frames, whole, fps=10)
    with open_video(parts, fps=10) as file:
        file.add(torch.from_numpy(frames[:1]).permute(0, 3, 1, 2))
        file.add([Image.fromarray(picture) for picture in as_bytes(frames[1:5])])
        file.add(frames[5:])
        assert not parts.exists()
    assert file.num_frames == 9
    if kind == "frames":
        assert len(list(whole.iterdir())) == 9
        assert [f.read_bytes() for f in sorted(whole.iterdir())] == [
            f.read_bytes() for f in sorted(parts.iterdir())
        ]
    else:
        assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize("kind", formats())
def test_nothing_of_a_written_picture_is_kept(tmp_path, kind):
    def held():
        gc.collect()
        images = sum(issubclass(type(one), Image.Image) for one in gc.get_objects())
        return images, tracemalloc.get_traced_memory()[0]

    picture = waves(1, 64, 64)
    with open_video(named(tmp_path, kind), fps=10) as file:
        file.add(picture)
        tracemalloc.start()
        before = held()
        for _ in range(12):
            file.add(picture)
        after = held()
        tracemalloc.stop()
    assert after[0] == before[0]
    assert after[1] - before[1] < picture.nbytes / 2


@pytest.mark.parametrize("kind", formats())
def test_a_failure_leaves_nothing(tmp_path, kind):
    path = named(tmp_path, kind)
    with pytest.raises(ValueError, match="at least one picture"):
        save_video([], path, fps=10)
    with pytest.raises(ValueError, match="of one size"):
        save_video([*pictures(2, 16, 16), *pictures(1, 8, 8)], path, fps=10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", formats("mp4"))
def test_enlarged_pixels_stay_square_and_small_pictures_are_taken(tmp_path, kind):
    frames = np.linspace(0, 1, 2 * 3 * 1 * 3, dtype=np.float32).reshape(2, 3, 1, 3)
    path = named(tmp_path, kind)
    save_video(frames, path, fps=25, scale=3)
    found, _ = read_back(path)
    assert found.shape == (2, 9, 3, 3)
    assert np.array_equal(found[:, ::3, ::3], as_bytes(frames))
    assert read_video_metadata(path) is None


@pytest.mark.parametrize("kind", formats("gif", "webp", "frames"))
def test_odd_sides_of_an_mp4_are_refused_and_even_ones_of_any_size_are_not(tmp_path, kind):
    path = named(tmp_path, kind)
    with pytest.raises(ValueError, match=r"sides for mp4 must be even.*scale=2.*got \(3, 4\)"):
        save_video(waves(2, 3, 4), path, fps=10)
    assert list(tmp_path.iterdir()) == []
    save_video(waves(2, 3, 4), path, fps=10, scale=2)
    assert read_back(path)[0].shape == (2, 6, 8, 3)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("a.avi", {}, "ending of .*a.avi' must be .mp4, .gif, .webp, or none for a folder"),
        ("a.gif", {"fps": 0}, "fps must be above 0 and at most 50 for gif, got 0"),
        ("a.gif", {"fps": 60}, "at most 50 for gif"),
        ("a.webp", {"fps": float("nan")}, "fps must be"),
        ("a.webp", {"scale": 0}, "scale must be an integer >= 1"),
    ],
)
def test_bad_arguments(tmp_path, name, options, reason):
    with pytest.raises(ValueError, match=reason):
        save_video(waves(1, 4, 4), tmp_path / name, **{"fps": 10, **options})
    assert list(tmp_path.iterdir()) == []


def test_bad_pictures(tmp_path):
    small = waves(1, 4, 4)
    with open_video(tmp_path / "a.webp", fps=10) as file:
        file.add(small)
        with pytest.raises(ValueError, match=r"of one size, \(4, 4\), got \(8, 4\)"):
            file.add(waves(1, 8, 4))
        for bad in (small + 1, small * np.nan, as_bytes(small)):
            with pytest.raises(ValueError, match=r"frames must be floats in \[0, 1\]"):
                file.add(bad)
        for bad in (small[0], "frames", torch.zeros(1, 4, 4, 3)):
            with pytest.raises(ValueError, match=r"frames must be a tensor \[F, 3, H, W\]"):
                file.add(bad)
    assert read_back(tmp_path / "a.webp")[0].shape == (1, 4, 4, 3)


def test_a_folder_that_is_not_empty_and_a_file_in_the_way_are_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    save_video(waves(1, 4, 4), tmp_path / "photos", fps=10)
    before = sorted((tmp_path / "photos").iterdir())
    (tmp_path / "file").write_text("x")
    for name in ("photos", "file", "file/inside.webp"):
        with pytest.raises(OSError, match=r"photos|file"):
            save_video(waves(2, 4, 4), tmp_path / name, fps=10)
    assert sorted((tmp_path / "photos").iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photos"]


def test_without_the_package_mp4_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r"pip install 'mmspec\[video\]', or write gif"):
        save_video(waves(1, 4, 4), tmp_path / "a.mp4", fps=10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", formats("gif", "webp", "frames"))
def test_what_ffmpeg_says_is_the_reason_of_a_failure(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("mmspec.video_files._FILTER", "no_such_filter")
    frames = waves(40, 64, 64)  # more than a pipe holds
    with pytest.raises(OSError, match="ffmpeg could not write the video"):
        save_video(frames, tmp_path / f"a.{kind}", fps=10)
    assert list(tmp_path.iterdir()) == []


def test_fractions_of_pictures_a_second_add_up(tmp_path):
    save_video(waves(30, 4, 4), tmp_path / "a.gif", fps=24000 / 1001)
    times = read_back(tmp_path / "a.gif")[1]
    assert all(
        abs(sum(times[:k]) - 1001 * k / 24) <= 5 for k in itertools.islice(range(31), 1, None)
    )


def test_something_else_has_no_metadata(tmp_path):
    path = tmp_path / "a.gif"
    path.write_text(json.dumps({"prompt": "x"}))
    assert read_video_metadata(path) is None
    assert read_video_metadata(tmp_path / "none.webp") is None
