#!/usr/bin/env python3
"""Write tests/data/tokenizer: vocabularies of real models, and texts with what becomes of them.

Needs: Python 3, pip install gguf regex, and the source of llama.cpp (MIT licence), which is also part of the source
distribution of llama-cpp-python as vendor/llama.cpp
Usage: scripts/tokenizer_goldens.py LLAMA_CPP      (from the root of the project)

vocabularies.json is made of models/ggml-vocab-*.gguf with their .inp and .out. splits.json is made of the texts
below and the regular expressions in src/llama-vocab.cpp, which the package `regex` evaluates. The README beside them
tells what is in them.
"""
import json
import re
import sys
import unicodedata
from pathlib import Path

import gguf
import regex

OUT = Path("tests/data/tokenizer")
# Kinds of tokens that stand for themselves in a text.
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
# What llama.cpp calls the pre-tokenizers that Sinter knows.
PRE_TYPES = """DEFAULT GPT2 MPT OLMO JAIS TRILLION GRANITE_DOCLING LLAMA3 DBRX SMAUG CHATGLM4 QWEN2 STABLELM2 HUNYUAN
    SOLAR_OPEN GROK_2 QWEN35 STARCODER SMOLLM REFACT COMMAND_R CODESHELL EXAONE MINERVA MELLUM2 FALCON DEEPSEEK_LLM
    DEEPSEEK_CODER DEEPSEEK3_LLM HUNYUAN_DENSE JOYAI_LLM TEKKEN""".split()
# Where llama.cpp only comes near the model's own expression, which stands beside it in a comment.
AS_PUBLISHED = ["TEKKEN"]

TEXTS = [
    # English contractions, whole and not.
    "I'm sure you're who he's, we've what they'll; I'd can't",
    "I'M SURE YOU'RE WHO HE'S, WE'VE WHAT THEY'LL; I'D CAN'T",
    "'Re 're 'rE 'Ve 'vE 'Ll 'lL 'S 'T 'M 'D 's 't 'm 'd",
    "'rain 'very 'later 'x 'r 'v 'l 'R 'L",
    "rock'n'roll O'Reilly's 'tis dogs' '' 's''t",
    # With letters behind, which only some rules leave to the next word.
    "a'sb a'Sb a'tb a'Tb a'reb a'Reb a'rEb a'REb a'veb a'Veb a'vEb a'VEb a'mb a'Mb a'llb a'Llb a'lLb a'LLb a'db a'Db",
    "it’s ‘quoted’ 1's 2'nd 'S'",
    # Numbers: runs of every length, of every kind, behind and before other things.
    "1 12 123 1234 12345 123456 1234567",
    "1234567",
    "a1b22c333d4444e55555",
    "3.14159 1,000,000 -42 +7 1e10 0x1F 2024-01-15 v1.2.3-rc4 10%",
    "½ ⅔ Ⅷ ⅷⅸⅹ x²³ ①②③④ ١٢٣٤ १२३४५ ４５６７ 一二三四",
    "1a 12b1 ½a4½½½½ 123½456 ½AB Ⅷx !½ $Ⅷ",
    "000 099 909 990 999 090 900 009 0001112229",
    "  1  12   123 \t1\n1",
    "$100 €20 20€ №5 #1 1# (1) 1) 1/2 1'2",
    # Letters and marks of many scripts.
    "e\u0301te\u0301 n\u0303andu\u0301 Vie\u0302\u0301t \u00e9t\u00e9",
    "\u0301a \u0301 a\u0301\u0302\u0303b \u0301\u0302 1\u03012 !\u0301a \u0301! a \u0301b",
    "नमस्ते दुनिया สวัสดีชาวโลก កាន់តែពិសេស",
    "שָׁלוֹם مَرْحَبًا Привет, мир! Ελληνικά Հայերեն ქართული ᎣᏏᏲ",
    "HelloWorld helloWORLD XMLHttpRequest iPhone aB Ab AB ABc aBC AbC aBcD",
    "ПриветМир приветМИР ΑΒΓαβγ ÉtéÀÉé ǅungla ǈ aǅ ʰa aʰB AʰBa A\u0301Ba ªBº AªBa ßẞ İi",
    "中Ab A中b a中B ab中AB 中中a A中 a中",
    "!Ab !aB x!Zz .HTTPServer -foo -Foo -FOO _Bar'Baz",
    # Chinese, Japanese, Korean; the ends of the ranges that rules name.
    "你好世界 我们ok吗 中文English混合 日本語のテスト カタカナー ひらがなゟ ゠ヿ 한국어 텍스트",
    "「引用」。 ，，！？、 〜〝 ｈａｌｆ　ｗｉｄｔｈ Ａ１！～ ・ 々〆",
    "\u4dff\u4e00\u4e01 \u9fa5\u9fa6 \u303f\u3040\u3041\u3042 \u30fe\u30ff\u3105 \u3400\u4dbf \U00020000\U0002a6d6",
    "\u07ff\u0800\u0801\u0901 \ud7fe\ud7ff\ue000 \uabff\uac00\ud7a3\ud7cb \u9fff\ua000 a\u0800 1\uac00!",
    # Ends of lines, with white space around them.
    "a\nb a\n\nb a \nb a\n b a \n b a  \n  b a\n\n\n",
    "\n a", "\na", " \n", "\n", "\n\n  \n", "  \n\n  a", "a \n\n \n b\n", "\n\n\n\na\n",
    "a\rb\r\rc \rd\rE\nF !\r ;\r\r\n.\n\r?", "A\nB\rC\nD",
    "a\r\nb\r\n\r\nc\r d\r\n", "a \r\n\t b \r \n c", "\r", "\r\n", " \r\n \r\n",
    ";\n );\n\n} {\n\n  x !?\r\n! .\n. ,\r\r, -\n\n- ok.\n", "=\n/ ///\n\n/ a/\n//\n /\r\n/ ~/\n",
    "line\u2028separator\u2029paragraph\u0085next\u000bvertical\u000cform", "a\u0085\u0085b \u2028 c\u2029\n",
    # White space alone, before, between and behind.
    "", " ", "  ", "   ", "\t", "\t\t", " \t ", "\u00a0", "\u3000\u3000",
    " a", "  a", "   a", "a ", "a  ", "a   ", " a b  c   d    e     ",
    "\ta\t\tb\t\t\tc", "a \tb a\t b a \t b\t", "\u00a0a a\u00a0b a\u00a0 b a \u00a0b\u00a0", "a\u3000b a \u3000b \u3000",
    "x  1  !  你  \u0301  é  \u200b  🦀  'x  's", "\t1\t!\t你\t\u0301\té\t🦀\t'x\t's", "\u2003a\u20031\u2003!\u2003\n",
    # Punctuation, symbols and what follows them.
    "(x) fn(x); a.b .method #include @user <tag> a->b x::y a+b=c a&&b || !c",
    "!!! ... -- --flag a_b __init__ ^^ |a|b| [i] {j} `code` ```\ncode\n``` ~~~",
    "~/path/to/file.txt C:\\dir https://x.y/z?q=1&r=2#f //comment /* c */ a/b /a",
    "\"quoted\" “curly” —dash– ¿qué? ¡sí! §1 ©®™ → ∑∫ ¬¦ ¢£¥ «a» ‹b› …c †d °C µm ·e",
    " !a  !a ! a !! a !1 !你 $a +a =a <a >a ^a `a |a ~a $ + = < > ^ ` | ~",
    "a!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~b", "!a\"b#c$d%e&f'g(h)i*j+k,l-m.n/o:p;q<r=s>t?u@v[w\\x]y^z_A`B{C|D}E~F",
    " !  \" # $% &' () *+ ,-./ :;<=>?@ [\\]^_` {|}~ ", "“a ”b ‘c ’d —e …f «g °h ©i €j →k",
    "a$b a+b a<b a=b a>b a^b a`b a|b a~b a$$b ++ == <> ^^ || ~~ `` .$. -+- !`! ",
    # Emoji, with joiners, variation selectors, skin tones and flags; and what is no letter, mark, number or sign.
    "🦀 🦀🦀crab a🦀b 👨‍👩‍👧 ❤️ 👍🏽 🇩🇪 1️⃣ 😶‍🌫️!",
    "\u200b\u200bzero\u200b \u200b1 \ufeffbom \u00adsoft \u2060! \u200d",
    "\u0000\u0001a \u0002\u0003 \u007f1\u001b[0m \u001ca\u001f\n", "\ue000\ue001a \ue000 1\ue000!\ue000",
    # A bit of each.
    "fn main() {\n    let v: Vec<u32> = vec![1, 22, 333, 4444];\n\n    println!(\"{v:?} – it's done\");\n}\n",
    "def f(x):\n\treturn x**2  # naïve\r\n\r\n\r\nprint(f(1234567.89))\t\n\n\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n* item\n  1. 你好，世界！\n     2. Ça va?   \n\n\n\t",
]


def alphabet():
    """The character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(0x100 + n) for n, b in enumerate(others)}}


def reduced(path, texts):
    """The part of a vocabulary that can matter for some texts."""
    fields = gguf.GGUFReader(path).fields
    get = lambda key: fields[f"tokenizer.ggml.{key}"].contents() if f"tokenizer.ggml.{key}" in fields else None
    tokens, kinds, byte_level = get("tokens"), get("token_type"), get("model") == "gpt2"
    chars = alphabet()
    if byte_level:
        within = "\0".join("".join(chars[b] for b in text.encode()) for text in texts)
    else:
        within = "\0".join("▁" + text.replace(" ", "▁") for text in texts)
    # Whatever encoding may join is a part of a text.
    plain = "\0".join(texts)
    named = {get(key) for key in ["bos_token_id", "eos_token_id", "unknown_token_id"]}
    bytes_ = set(chars.values()) if byte_level else set()
    kept = [id for id, token in enumerate(tokens)
            if token in within or token in bytes_ or kinds[id] == BYTE or id in named
            or kinds[id] == USER_DEFINED and token in plain]
    joined = lambda merge: merge.replace(" ", "", 1) if merge[0] != " " else None
    vocabulary = {
        "model": get("model"),
        "pre": get("pre"),
        **{key: kept.index(get(key)) for key in ["bos_token_id", "eos_token_id", "unknown_token_id"]
           if get(key) is not None},
        **{key: bool(get(key)) for key in ["add_bos_token", "add_space_prefix"] if get(key) is not None},
        "ids": kept,
        "tokens": [tokens[id] for id in kept],
        "kinds": {kept.index(id): int(kinds[id]) for id in kept if kinds[id] != 1},
    }
    if byte_level:
        vocabulary["merges"] = [merge for merge in get("merges") if joined(merge) in within]
    else:
        scores = get("scores")
        vocabulary["scores"] = [float(scores[id]) for id in kept]
    return vocabulary


def vocabularies(models):
    texts, result = [], {}
    for path in sorted(models.glob("ggml-vocab-*.gguf")):
        inputs, outputs = Path(f"{path}.inp"), Path(f"{path}.out")
        model = gguf.GGUFReader(path).fields["tokenizer.ggml.model"].contents()
        if not inputs.exists() or model not in ["gpt2", "llama"]:
            continue
        own = inputs.read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
        ids = [[int(id) for id in line.split()] for line in outputs.read_text().splitlines()]
        assert len(own) == len(ids), path
        texts += [text for text in own if text not in texts]
        vocabulary = reduced(path, own)
        missing = {id for line in ids for id in line} - set(vocabulary["ids"])
        assert not missing, (path, missing)
        vocabulary["expected"] = [[texts.index(text), line] for text, line in zip(own, ids)]
        result[path.stem.removeprefix("ggml-vocab-")] = vocabulary
    return {"texts": texts, "vocabularies": result}


def unescaped(literal):
    """The text of a string literal in C++."""
    escapes = {"n": "\n", "r": "\r", "t": "\t"}
    return re.sub(r"\\(.)", lambda m: escapes.get(m[1], m[1]), literal)


def expressions(source):
    """The regular expressions of each pre-tokenizer."""
    begin = source.index("switch (vocab.get_pre_type())")
    cases = source[begin:source.index("std::vector<std::string> regex_exprs;", begin)]
    result, names, used, published = {}, [], [], []
    for line in map(str.strip, cases.splitlines()):
        if match := re.match(r"case LLAMA_VOCAB_PRE_TYPE_(\w+):|(default):", line):
            names.append(match[1] or "DEFAULT")
        elif match := re.match(r'(//\s*)?"(.*)",?$', line):
            (published if match[1] else used).append(unescaped(match[2]))
        elif line == "break;":
            result |= {name: published if name in AS_PUBLISHED else used for name in names}
            names, used, published = [], [], []
    return result


def rules(source):
    """The names of each pre-tokenizer, and what else they decide."""
    begin = source.index('tokenizer_pre == "default"')
    text = source[begin:source.index("LLAMA_VOCAB_TYPE_SPM", begin)]
    result = []
    for block in re.split(r"\belse if\b", text):
        names = re.findall(r'tokenizer_pre == "([^"]+)"', block)
        kind = re.search(r"pre_type = LLAMA_VOCAB_PRE_TYPE_(\w+);", block)
        # The names with this are other rules: a separator ends their texts.
        if names and kind and kind[1] in PRE_TYPES and "add_sep = true" not in block:
            result.append((names, kind[1], "ignore_merges = true" in block, "add_bos = true" in block))
    return result


def split(patterns, text):
    """The words of a text: matches, and what lies between them, split by each pattern in turn."""
    words = [text] if text else []
    for pattern in patterns:
        finer = []
        for word in words:
            end = 0
            for match in regex.finditer(pattern, word):
                finer += [word[end:match.start()], match[0]]
                end = match.end()
            finer.append(word[end:])
        words = [word for word in finer if word]
    assert "".join(words) == text
    return words


def boundaries(pattern, between):
    """The characters at the ends of each range of a class, and those just outside, in texts that tell them apart."""
    singles = re.sub(r"([^\x00-\x7f])-([^\x00-\x7f])", "", pattern)
    ends = {ord(c) + near for c in singles if c > "\x7f" for near in [-1, 0, 1]}
    for low, high in re.findall(r"([^\x00-\x7f])-([^\x00-\x7f])", pattern):
        ends |= {ord(low) - 1, ord(low), ord(high), ord(high) + 1}
    known = [chr(c) for c in sorted(ends) if unicodedata.category(chr(c)) not in ["Cn", "Cs"]]
    return [between + between.join(known[at:at + 60]) + between for at in range(0, len(known), 60)]


def splits(source):
    known = expressions(source)
    # Classes that list characters; most of these are also in the class of Chinese.
    _, cased, marks, *_ = known["DEEPSEEK_LLM"]
    texts = TEXTS + boundaries(cased, "é") + boundaries(cased, "你") + boundaries(marks, "!") + boundaries(marks, "你")
    groups = {}
    for names, kind, whole_words, add_bos in rules(source):
        groups.setdefault((tuple(known[kind]), whole_words, add_bos), []).extend(names)
    result = [{"names": names, "whole_words": whole_words, "add_bos": add_bos, "patterns": list(patterns)}
              for (patterns, whole_words, add_bos), names in groups.items()]
    distinct = list(dict.fromkeys(patterns for patterns, _, _ in groups))
    for rule in result:
        rule["splits"] = distinct.index(tuple(rule.pop("patterns")))
    words = []
    for text in texts:
        of_pattern = [split(patterns, text) for patterns in distinct]
        # Where each word ends, in bytes.
        ends = [[len(word.encode()) for word in each] for each in of_pattern]
        words.append([text, ends])
    return {"rules": result, "texts": words}


def write(name, value):
    # A line for each item, so that changes can be read.
    def lines(value, depth):
        inner = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        if depth == 0 or not isinstance(value, (dict, list)) or len(inner) < 120:
            return inner
        if isinstance(value, dict):
            items = [f"{json.dumps(key)}:{lines(item, depth - 1)}" for key, item in value.items()]
            return "{\n" + ",\n".join(items) + "\n}"
        return "[\n" + ",\n".join(lines(item, depth - 1) for item in value) + "\n]"

    (OUT / name).write_text(lines(value, 3) + "\n", newline="\n")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    llama_cpp = Path(sys.argv[1])
    source = (llama_cpp / "src/llama-vocab.cpp").read_text()
    OUT.mkdir(parents=True, exist_ok=True)
    assert len(set(TEXTS)) == len(TEXTS)
    write("vocabularies.json", vocabularies(llama_cpp / "models"))
    write("splits.json", splits(source))


if __name__ == "__main__":
    main()
