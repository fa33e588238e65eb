"""Small PDF files with a text layer, written by hand; protected ones too."""

import hashlib
from pathlib import Path

#: PDF 32000-1, section 7.6.3.3: what fills passwords up to 32 bytes.
PADDING = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")
FILE_ID = b"mmspec file of 1"
PERMISSIONS = -4


def rc4(key: bytes, content: bytes) -> bytes:
    box = list(range(256))
    j = 0
    for i in range(256):
        j = (j + box[i] + key[i % len(key)]) % 256
        box[i], box[j] = box[j], box[i]
    out, i, j = bytearray(), 0, 0
    for byte in content:
        i = (i + 1) % 256
        j = (j + box[i]) % 256
        box[i], box[j] = box[j], box[i]
        out.append(byte ^ box[(box[i] + box[j]) % 256])
    return bytes(out)


def write_pdf(path: str | Path, pages: list[str], *, password: str | None = None) -> Path:
    """A page for each text, lines in Helvetica, 144 x 144 points; an empty text is a blank page."""
    key, owner, user = keys(password)

    def stream(number: int, text: str) -> bytes:
        shown = " T* ".join(f"({line}) Tj" for line in text.split("\n"))
        content = f"BT /F 9 Tf 10 TL 6 130 Td {shown} ET".encode() if text else b""
        if password is not None:
            own = hashlib.md5(key + number.to_bytes(3, "little") + b"\0\0").digest()[:10]
            content = rc4(own, content)
        return b"<< /Length %d >> stream\n%s\nendstream" % (len(content), content)

    first = 5
    kids = " ".join(f"{first + 2 * k} 0 R" for k in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Filter /Standard /V 1 /R 2 /P %d /O <%s> /U <%s> >>"
        % (PERMISSIONS, owner.hex().encode(), user.hex().encode()),
    ]
    for k, text in enumerate(pages):
        number = first + 2 * k
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 144 144] /Contents %d 0 R "
            b"/Resources << /Font << /F 3 0 R >> >> >>" % (number + 1)
        )
        objects.append(stream(number + 1, text))
    return write_objects(Path(path), objects, is_protected=password is not None)


def keys(password: str | None) -> tuple[bytes, bytes, bytes]:
    """The key of the file and the owner's and the user's entry: algorithms 2 to 4, revision 2."""
    padded = ((password or "").encode() + PADDING)[:32]
    owner = rc4(hashlib.md5(padded).digest()[:5], padded)
    flags = PERMISSIONS.to_bytes(4, "little", signed=True)
    key = hashlib.md5(padded + owner + flags + FILE_ID).digest()[:5]
    return key, owner, rc4(key, PADDING)


def write_objects(path: Path, objects: list[bytes], *, is_protected: bool) -> Path:
    content, starts = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        starts.append(len(content))
        content += b"%d 0 obj %s endobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % start for start in starts)
    trailer = b"/Size %d /Root 1 0 R /ID [<%s> <%s>]" % (
        len(objects) + 1,
        FILE_ID.hex().encode(),
        FILE_ID.hex().encode(),
    )
    if is_protected:
        trailer += b" /Encrypt 4 0 R"
    xref = b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    end = b"trailer << %s >>\nstartxref\n%d\n%%%%EOF\n" % (trailer, len(content))
    path.write_bytes(content + xref + end)
    return path
