"""Gets the demo's text, the King James Bible and Jane Austen's six novels, from three Debian packages. All of
them are in the public domain.

    python demo/get_text.py CACHE

It calls apt-get download and dpkg-deb, installs nothing and does not need root. It writes one UTF-8 file per
book, with one verse or paragraph per line. The books of HELD_OUT go to CACHE/held_out/, the others to
CACHE/train/ (kjv-01-genesis.txt and so on).
"""

import argparse
import os
import re
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

PACKAGES = ("bible-kjv", "bible-kjv-text", "r-cran-janeaustenr")
# The model never sees these. The novel resembles the other five but shares no text with them. Acts repeats no
# other book of the Bible.
HELD_OUT = ("austen-persuasion", "kjv-44-acts")
NOVELS = {
    "emma": "Emma",
    "mansfieldpark": "Mansfield Park",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
    "prideprejudice": "Pride and Prejudice",
    "sensesensibility": "Sense and Sensibility",
}
BOOKS = [
    name.replace("_", " ")
    for name in """Genesis Exodus Leviticus Numbers Deuteronomy Joshua Judges Ruth 1_Samuel 2_Samuel 1_Kings
2_Kings 1_Chronicles 2_Chronicles Ezra Nehemiah Esther Job Psalms Proverbs Ecclesiastes
Song_of_Solomon Isaiah Jeremiah Lamentations Ezekiel Daniel Hosea Joel Amos Obadiah Jonah Micah
Nahum Habakkuk Zephaniah Haggai Zechariah Malachi Matthew Mark Luke John Acts Romans
1_Corinthians 2_Corinthians Galatians Ephesians Philippians Colossians 1_Thessalonians
2_Thessalonians 1_Timothy 2_Timothy Titus Philemon Hebrews James 1_Peter 2_Peter 1_John 2_John
3_John Jude Revelation""".split()
]


def unpack(folder):
    """Download the packages to `folder` and unpack them there."""
    subprocess.run(["apt-get", "-qq", "download", *PACKAGES], cwd=folder, check=True)
    for package in Path(folder).glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)


def bible(folder):
    """-> {"kjv-01-genesis": text}: each chapter has a heading, then one verse per line."""
    printed = subprocess.run(
        [f"{folder}/usr/bin/bible", "-p", f"{folder}/usr/lib", "-f", "Gen1:1-Rev22:21"],
        check=True,
        capture_output=True,
        encoding="ascii",
    ).stdout
    verses = [re.fullmatch(r"(\w+?)(\d+):(\d+) (.+)", line).groups() for line in printed.splitlines()]
    abbreviations = list(dict.fromkeys(verse[0] for verse in verses))
    assert len(abbreviations) == len(BOOKS) == 66 and len(verses) == 31102
    texts = {}
    for number, (abbreviation, book) in enumerate(zip(abbreviations, BOOKS), 1):
        lines = []
        for _, chapter, verse, words in (verse for verse in verses if verse[0] == abbreviation):
            if verse == "1":
                lines += ["", f"{book} {chapter}", ""]
            lines.append(words.strip())
        texts[f"kjv-{number:02}-{book.lower().replace(' ', '-')}"] = "\n".join(lines[1:]) + "\n"
    return texts


def strings(entry):
    """Decode one entry of an R lazy-load database: a length, then zlib of R's serialisation in XDR format."""
    data = zlib.decompress(entry[4:])
    assert data[:2] == b"X\n"
    version, _, _ = struct.unpack_from(">3i", data, 2)
    at = 14
    if version == 3:
        at += 4 + struct.unpack_from(">i", data, at)[0]
    flags, count = struct.unpack_from(">2i", data, at)
    assert flags & 255 == 16, "expected a character vector (STRSXP)"
    at += 8
    lines = []
    for _ in range(count):
        flags, size = struct.unpack_from(">2i", data, at)
        assert flags & 255 == 9 and size >= 0
        at += 8
        lines.append(data[at : at + size].decode())
        at += size
    return lines


def novels(folder):
    """-> {"austen-emma": text}: one paragraph per line, with empty lines between paragraphs and headings."""
    data = Path(folder, "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    texts, at = {}, 0
    for name, title in NOVELS.items():
        unpacker = zlib.decompressobj()
        unpacker.decompress(data[at + 4 :])
        end = len(data) - len(unpacker.unused_data)
        lines, at = strings(data[at:end]), end
        assert lines[0].upper() == title.upper(), f"{lines[0]} found, expected {title}"
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", "\n".join(lines))]
        text = "\n\n".join(part for part in paragraphs if part) + "\n"
        texts[f"austen-{name}"] = text.replace("_", "")  # italics
    assert at == len(data)
    return texts


def main(cache):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        unpack(folder)
        texts = bible(folder) | novels(folder)
    for folder in ("train", "held_out"):
        Path(cache, folder).mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        Path(cache, "held_out" if name in HELD_OUT else "train", name + ".txt").write_text(
            text, encoding="utf-8"
        )
    size = sum(len(text) for text in texts.values())
    print(f"{cache}: {len(texts)} books, {size:,} characters, held out {', '.join(HELD_OUT)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("cache", metavar="CACHE")
    main(**vars(parser.parse_args()))
