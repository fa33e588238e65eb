import zlib

import pytest
from pdfs import write_objects, write_pdf
from PIL import Image

from mmspec.documents import DOCUMENTS, PICTURES, Reader, Sheet, find_files, page_ranges


def red():
    return Image.new("RGB", (40, 20), "red")


def blue():
    return Image.new("RGB", (20, 40), "blue")


def reason(call, *arguments):
    with pytest.raises(ValueError, match=r".") as caught:
        call(*arguments)
    return str(caught.value)


# ----------------------------------------------------------------------------------------- PDFs
def test_a_born_digital_page_is_drawn_and_has_its_text(tmp_path):
    file = write_pdf(tmp_path / "a.pdf", ["first line\nsecond line", "page two", ""])
    reader = Reader(dpi=72)
    assert reader.open(file).num_pages == 3
    sheet = reader.read(file, 1)
    assert sheet.text == "first line\nsecond line"
    assert (sheet.image.size, sheet.image.mode) == ((144, 144), "RGB")
    assert not sheet.is_blank
    assert reader.read(file, 2).text == "page two"
    assert Reader(dpi=144).read(file, 2).image.size == (288, 288)
    blank = reader.read(file, 3)
    assert (blank.text, blank.is_blank) == (None, True)


def test_a_scanned_pdf_has_no_text(tmp_path):
    file = tmp_path / "scan.pdf"
    red().save(file, save_all=True, append_images=[blue()])
    sheets = [Reader(dpi=72).read(file, number) for number in (1, 2)]
    assert [sheet.text for sheet in sheets] == [None, None]
    first, second = (sheet.image.getpixel((10, 10)) for sheet in sheets)
    assert first[0] > 200 > 50 > first[2]
    assert second[2] > 200 > 50 > second[0]


def test_a_password_is_asked_for_and_opens(tmp_path):
    file = write_pdf(tmp_path / "secret.pdf", ["hidden words"], password="sesame")
    for call in (Reader().open, lambda path: Reader().read(path, 1)):
        assert reason(call, file) == f"{file} is protected by a password, and none was given"
    wrong = Reader(password="open")
    assert "is protected by a password, and the given one is wrong" in reason(wrong.open, file)
    assert "open" not in repr(wrong)
    assert Reader(password="sesame").read(file, 1).text == "hidden words"


def test_the_fields_of_a_form_are_drawn(tmp_path):
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [4 0 R] >> >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 72 72] /Annots [4 0 R] >>",
        b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /V (x) /Rect [9 9 63 63] /F 4 "
        b"/AP << /N 5 0 R >> >>",
        b"<< /Type /XObject /Subtype /Form /BBox [0 0 54 54] /Length 19 >> stream\n"
        b"1 0 0 rg 0 0 54 54 re f\nendstream",
    ]
    file = write_objects(tmp_path / "form.pdf", objects, is_protected=False)
    assert Reader(dpi=72).read(file, 1).image.getpixel((36, 36))[2] < 255


def test_a_page_too_large_to_draw_is_refused(tmp_path):
    file = write_pdf(tmp_path / "a.pdf", ["x"])
    line = reason(Reader(dpi=10_000).read, file, 1)
    assert f"{file}, page 1 cannot be read: size of the page must be at most" in line
    assert "20000 x 20000" in line


# ------------------------------------------------------------------------------------- pictures
def test_a_scan_of_several_pages(tmp_path):
    file = tmp_path / "scan.tiff"
    red().save(file, save_all=True, append_images=[blue()])
    reader = Reader()
    assert reader.open(file).num_pages == 2
    assert reader.read(file, 2).image.tobytes() == blue().tobytes()
    assert "page 3 cannot be read" in reason(reader.read, file, 3)


def test_pictures_come_upright_and_on_white(tmp_path):
    turned, clear, deep = (tmp_path / name for name in ("turned.png", "clear.png", "deep.png"))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn, as telephones store it
    red().save(turned, exif=exif)
    assert Reader().read(turned, 1).image.size == (20, 40)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(clear)
    sheet = Reader().read(clear, 1)
    assert sheet.image.getpixel((0, 0)) == (255, 255, 255)
    assert sheet.is_blank
    Image.new("I;16", (4, 4), 0x8000).save(deep)
    assert Reader().read(deep, 1).image.getpixel((0, 0)) == (128, 128, 128)


def test_one_colour_is_blank_and_one_other_pixel_is_not():
    image = Image.new("RGB", (5, 5), "white")
    assert Sheet(image=image).is_blank
    image.putpixel((4, 4), (255, 255, 254))
    assert not Sheet(image=image).is_blank


# ------------------------------------------------------------------------------------ bad input
def test_a_picture_without_pixels_is_refused(tmp_path):
    file = tmp_path / "flat.png"
    Image.new("RGB", (3, 3)).save(file)
    content = bytearray(file.read_bytes())
    content[16:20] = bytes(4)  # the width in the header, and the header's sum
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    file.write_bytes(content)
    assert f"{file} cannot be read" in reason(Reader().open, file)


def test_unusable_files_are_refused_by_name(tmp_path):
    empty, broken, cut = (tmp_path / name for name in ("e.png", "b.pdf", "cut.png"))
    empty.touch()
    broken.write_bytes(b"%PDF-1.4 and no more")
    Image.effect_noise((90, 90), 60).save(cut)
    cut.write_bytes(cut.read_bytes()[:3000])
    reader = Reader()
    assert reason(reader.open, empty) == f"{empty} is empty (0 bytes)"
    assert f"{broken} cannot be read as a PDF" in reason(reader.open, broken)
    assert f"{tmp_path / 'no.pdf'} cannot be read: No such file" in reason(
        reader.open, tmp_path / "no.pdf"
    )
    assert reader.open(cut).num_pages == 1
    assert f"{cut}, page 1 cannot be read" in reason(reader.read, cut, 1)
    nothing = write_pdf(tmp_path / "nothing.pdf", [])
    assert str(nothing) in reason(reader.open, nothing)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    assert f"{text} cannot be read" in reason(reader.open, text)


@pytest.mark.parametrize("dpi", [0, -1, 1.5, True])
def test_an_impossible_resolution_is_refused(dpi):
    assert "dpi must be an integer >= 1" in reason(lambda: Reader(dpi=dpi))


# -------------------------------------------------------------------------------------- folders
def test_folders_are_searched_in_natural_order(tmp_path):
    for name in ("p10.png", "p2.PNG", "b.pdf", "notes.txt", ".hidden.png", "sub/c.jpg", "~.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    flat = find_files([tmp_path], DOCUMENTS)
    assert list(flat.values()) == ["b.pdf", "p2.PNG", "p10.png"]
    deep = find_files([tmp_path], PICTURES, recursive=True)
    assert list(deep.values()) == ["p2.PNG", "p10.png", "sub/c.jpg"]
    mixed = find_files([tmp_path / "p10.png", tmp_path / "sub"], DOCUMENTS)
    assert mixed == {tmp_path / "p10.png": "p10.png", tmp_path / "sub" / "c.jpg": "c.jpg"}


def test_files_that_cannot_be_meant_are_refused(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "none").mkdir()
    assert "does not exist" in reason(find_files, [tmp_path / "no.pdf"], DOCUMENTS)
    assert "is of another kind; known: .pdf" in reason(
        find_files, [tmp_path / "notes.txt"], DOCUMENTS
    )
    assert "no files with .pdf" in reason(find_files, [tmp_path / "none"], DOCUMENTS)
    assert "different files" in reason(find_files, [tmp_path, tmp_path / "a.png"], DOCUMENTS)


def test_page_ranges():
    found = page_ranges("1-3, 7,10-")
    assert [n for n in range(1, 13) if any(n in span for span in found)] == [1, 2, 3, 7, 10, 11, 12]


@pytest.mark.parametrize("text", ["", "0", "3-1", "a", "1,,2", "-3", "1-2-3", "1 2"])
def test_pages_that_cannot_be_meant_are_refused(text):
    assert "pages must be like 1-3,7,10-" in reason(page_ranges, text)
