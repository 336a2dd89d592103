"""Build the pretraining corpus of the small bundled MoE, and the bundled fine-tuning rows.

Four domains, one JSONL file each for train and held-out, rows {"text": ...}:
  stories  TinyStories: the cased file, and those of the lower-case file that it does not hold
  books    72 public-domain books, cut at their headings
  code     the running interpreter's standard library, one row per module
  maths    GSM8K train rows and procedural problems from reasoning-gym
Held-out rows are whole documents that are not in train. GSM8K rows go by the sha256 of their
question: the first 1,200 are bundled for fine-tuning, the next are held-out maths, the rest train.

To rebuild: get the files of INPUTS_TABLE from their GitHub repositories (books: "Author/Title.md"
in that order, joined by two newlines), gzip them under the names in the table into one directory,
`pip install reasoning-gym`, and run
    python tools/build_corpus.py --source DIR
Code depends on the Python version and maths on the reasoning-gym version; manifest.json has both.
"""

import argparse
import contextlib
import gzip
import hashlib
import itertools
import json
import platform
import re
import sysconfig
from importlib import metadata
from pathlib import Path

# File under --source, sha256 of its uncompressed bytes, public origin (repository @ commit : path).
INPUTS_TABLE = """
gsm8k/train.jsonl.gz 17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465
  openai/grade-school-math @ 3101c7d507 : grade_school_math/data/train.jsonl
text/tinystories_cased_1MB.txt.gz c56cfd24fb1c542b141a396184b822a4db3672abdb4c49c6aa843171c5e822a5
  s-ajaykumar/smallGPT @ b8b899265a : data/tiny_stories.txt
text/tinystories_lower_4MB.txt.gz 30c6f2fac206d82e76b80dbbede28f6b5415c8d8571dde6bfd8226ab41744a2c
  Arnoochka/Transformer-Parallelism @ 911b9e732f : tinystories.txt
text/childrens_books.md.gz e3d9f2b10ee519556682ca223de25f1219e5c80acc2635d2fba680c45a1649f4
  mlschmitt/classic-books-markdown @ 944882722e : Beatrix Potter/Great Big Treasury of Beatrix
  Potter; Hans Christian Andersen/Andersen's Fairy Tales; The Brothers Grimm/Grimms' Fairy Tales; J.
  M. Barrie/Peter Pan; Kenneth Grahame/The Wind in the Willows; L. Frank Baum/The Wonderful Wizard
  of Oz, Ozma of Oz, The Marvelous Land of Oz; Lewis Carroll/Alice's Adventures in Wonderland,
  Through the Looking-Glass; Mark Twain/The Adventures of Tom Sawyer; Rudyard Kipling/The Jungle
  Book
text/classic_books.md.gz c9a8a1e7103519d8c6e186147cac918a13f0276db0398327cf87feae6f567fe1
  mlschmitt/classic-books-markdown @ 944882722e : Jane Austen/Pride and Prejudice, Emma; Herman
  Melville/Moby-Dick; Charles Dickens/Great Expectations; Bram Stoker/Dracula; Charles Darwin/On the
  Origin of Species; Homer/The Odyssey; Mark Twain/A Connecticut Yankee in King Arthur's Court;
  Johann David Wyss/Swiss Family Robinson; Daniel Defoe/Robinson Crusoe; Henry David Thoreau/Walden
text/classic_books_2.md.gz 77bda2eed4f4796f5cf4dbc4ee0bf247789b9fc668e097b9da3322305cceb1f0
  mlschmitt/classic-books-markdown @ 944882722e : Arthur Conan Doyle/A Study in Scarlet, The Hound
  of the Baskervilles, The Lost World, The Poison Belt, The Sign of the Four, The Tragedy of the
  Korosko, The Valley of Fear; Charles Dickens/A Christmas Carol, A Tale of Two Cities, Hard Times,
  Oliver Twist, Some Short Christmas Stories; Edith Wharton/A Son at the Front, Ethan Frome, Summer,
  Tales of Men and Ghosts, The Age of Innocence, The House of Mirth, The Reef; H.G. Wells/Men Like
  Gods, Tales of Space and Time, The First Men in the Moon, The History of Mr Polly, The Invisible
  Man, The Island of Doctor Moreau, The Sleeper Awakes, The Time Machine, The World Set Free, Thirty
  Strange Stories, War of the Worlds; Jack London/Lost Face, Martin Eden, The Call of the Wild, The
  House of Pride, The Iron Heel, The Mutiny of the Elsinore, The Road, The Scarlet Plague, The Sea
  Wolf, White Fang; Jane Austen/Lady Susan, Love and Friendship and Other Early Works, Mansfield
  Park, Northanger Abbey, Persuasion, Sense and Sensibility; Joseph Conrad/Heart of Darkness, Lord
  Jim, Nostromo
"""
INPUTS = {
    name: (digest, " ".join(origin.split()))
    for name, digest, origin in re.findall(r"(?m)^(\S+) (\S+)\n((?:  .+\n)+)", INPUTS_TABLE)
}
HELD_OUT_BOOKS = ("Peter Pan", "Dracula", "Hard Times", "The Sea Wolf")  # a run of pieces of each
# Not tests, not other people's packages, not character tables, not files of one machine's build.
CODE_SKIP = re.compile(r"(^|/)(tests?|idle_test|site-packages|encodings|config-[^/]*|_sysconfig)")
# All give the same rows for the same seed on any day; gsm_symbolic gets four times the bytes.
MATHS_TASKS = (
    "gsm_symbolic leg_counting chain_sum basic_arithmetic simple_equations gcd lcm products "
    "fraction_simplification calendar_arithmetic decimal_chain_sum count_bits prime_factorization"
).split()
# UTF-8 read as cp1252 in the story files; a lone pair is a closing quote that lost its third byte.
MOJIBAKE = {"â€œ": '"', "â€™": "'", "â€˜": "'", "â€“": "-", "â€”": "-", "â€¦": "...", "â€": '"'}
HELD_OUT_BYTES, TRAIN_BYTES, MATHS_BYTES = 200_000, 14_000_000, 6_000_000
BUNDLED, BUNDLED_TRAIN = 1200, 1000  # rows in all, and of them for training


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def size(texts):
    return sum(len(text.encode()) for text in texts)


def squeeze(text):
    """Returns the key for duplicates: case and white space do not count."""
    return " ".join(text.lower().split())


def unique(texts, *, seen=()):
    """Returns the texts in order, without those whose key came before or is in `seen`."""
    keys = set(seen)
    return [t for t in texts if (key := squeeze(t)) not in keys and not keys.add(key)]


def take(texts, max_bytes):
    """Returns how many of the first texts fit into `max_bytes`."""
    ends = itertools.accumulate(len(text.encode()) for text in texts)
    return sum(end <= max_bytes for end in ends)


def read_input(source, name):
    (expected, origin), path = INPUTS[name], source / name
    if not path.is_file():
        raise SystemExit(f"--source must hold {name}, which is missing: gzip of {origin}")
    data = gzip.decompress(path.read_bytes())
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise SystemExit(f"{path} must have sha256 {expected} uncompressed, got {found}: {origin}")
    return data.decode().replace("\r\n", "\n")


def build_stories(source):
    names = ("cased_1MB", "lower_4MB")  # in this order, so that the cased copy of a story stays
    raw = "\n".join(read_input(source, f"text/tinystories_{name}.txt.gz") for name in names)
    for wrong, right in MOJIBAKE.items():
        raw = raw.replace(wrong, right)
    # A single newline parts two stories, now and then two paragraphs of one: keep all from one
    # "once upon a time" to the next on the same side of the split.
    pieces = [piece.strip() for piece in re.split(r"(?<!\n)\n(?!\n)", raw)]
    groups = []
    for piece in unique(filter(None, pieces)):
        if not groups or piece.lower().startswith("once upon a time"):
            groups.append([])
        groups[-1].append(piece)
    by_hash = sorted(groups, key=lambda group: sha256(group[0]))
    cut = take(["".join(group) for group in by_hash], HELD_OUT_BYTES)
    held_out = {group[0] for group in by_hash[:cut]}
    train = [piece for group in groups if group[0] not in held_out for piece in group]
    return train, [piece for group in groups if group[0] in held_out for piece in group]


def build_books(source):
    train, held_out = [], []
    for name in ("childrens_books", "classic_books", "classic_books_2"):
        for book in re.split(r"(?m)^# Title: ", read_input(source, f"text/{name}.md.gz"))[1:]:
            title, _, body = book.partition("\n")
            chapters = re.split(r"(?m)^(?=#{1,6} )", body.partition("-------\n")[2])
            pieces = [chapter.strip() for chapter in chapters if len(chapter) > 300]
            if title.strip() in HELD_OUT_BOOKS:
                start = len(pieces) // 2
                stop = start + take(pieces[start:], HELD_OUT_BYTES // len(HELD_OUT_BOOKS))
                held_out += pieces[start:stop]
                pieces[start:stop] = []
            train += pieces
    train = unique(train, seen=map(squeeze, held_out))
    by_hash = sorted(train, key=sha256)
    kept = set(by_hash[: take(by_hash, TRAIN_BYTES)])
    return [piece for piece in train if piece in kept], held_out


def build_code():
    root = Path(sysconfig.get_path("stdlib"))
    modules = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if not CODE_SKIP.search(name) and 100 <= path.stat().st_size <= 200_000:
            with contextlib.suppress(UnicodeDecodeError):  # a module in another encoding
                modules[name] = path.read_text(encoding="utf-8")
    by_hash = unique(modules[name] for name in sorted(modules, key=sha256))
    cut = take(by_hash, HELD_OUT_BYTES)
    return by_hash[cut : cut + take(by_hash[cut:], TRAIN_BYTES)], by_hash[:cut]


def read_gsm8k(source):
    """Returns (question, answer) in the order of the question's sha256, calculator notes
    removed.
    """
    lines = read_input(source, "gsm8k/train.jsonl.gz").splitlines()
    rows = {row["question"]: row["answer"] for row in map(json.loads, lines)}
    return [(q, re.sub(r"<<.*?>>", "", rows[q])) for q in sorted(rows, key=sha256)]


def make_problems(total_bytes, *, seed, seen):
    """Generates procedural problems; row i of a task is drawn from seed + i, so keep seeds far
    apart.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise SystemExit("Maths needs reasoning-gym: pip install reasoning-gym") from None
    problems = []
    for task in MATHS_TASKS:
        share = (4 if task == "gsm_symbolic" else 1) / (len(MATHS_TASKS) + 3)
        budget = int(total_bytes * share)
        texts = []
        for row in reasoning_gym.create_dataset(task, size=budget // 20, seed=seed):
            texts.append(f"{row['question'].strip()}\n{row['answer']}")
            budget -= len(texts[-1].encode())
            if budget < 0:
                break
        problems += unique(texts, seen=seen)
    return problems


def build_maths(rows):
    texts = unique(f"{question}\n{answer}" for question, answer in rows)
    cut = take(texts, HELD_OUT_BYTES // 2)
    held_out = texts[:cut] + make_problems(HELD_OUT_BYTES // 2, seed=10_000_000, seen=())
    budget, seen = MATHS_BYTES - size(texts[cut:]), set(map(squeeze, held_out))
    return texts[cut:] + make_problems(budget, seed=0, seen=seen), held_out


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
    return {"rows": len(rows), "bytes": len(text.encode()), "sha256": sha256(text)}


def write_bundle(directory, rows):
    """Writes the fine-tuning rows; the README beside them has their origin, rule and hashes."""
    pairs = [{"prompt": question, "response": answer} for question, answer in rows]
    for split, part in (("train", pairs[:BUNDLED_TRAIN]), ("heldout", pairs[BUNDLED_TRAIN:])):
        print(directory.name, split, write_jsonl(directory / f"{split}.jsonl", part))


def main():
    parser = argparse.ArgumentParser(description="Build the pretraining corpus and bundled rows.")
    parser.add_argument("--source", type=Path, required=True, help="the files of INPUTS_TABLE")
    parser.add_argument("--out", type=Path, default=Path("build/corpus"))
    parser.add_argument("--bundle", type=Path, default=Path("drlora_jax/bundled/gsm8k"))
    args = parser.parse_args()
    gsm8k = read_gsm8k(args.source)
    write_bundle(args.bundle, gsm8k[:BUNDLED])
    domains = {
        "stories": build_stories(args.source),
        "books": build_books(args.source),
        "code": build_code(),
        "maths": build_maths(gsm8k[BUNDLED:]),
    }
    files = {}
    for domain, parts in domains.items():
        for split, texts in zip(("train", "heldout"), parts, strict=True):
            name = f"{split}/{domain}.jsonl"
            files[name] = write_jsonl(args.out / name, [{"text": text} for text in texts])
            files[name]["text_bytes"] = size(texts)
            print(name, files[name])
    manifest = {
        "files": files,
        "inputs": {name: {"origin": o, "sha256": digest} for name, (digest, o) in INPUTS.items()},
        "python": platform.python_version(),
        "reasoning_gym": metadata.version("reasoning-gym"),
    }
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
