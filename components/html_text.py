"""The text of a web page, as a browser lays it out where no style sheet says otherwise.

    page_text(bytes) -> markup;  visible_text(markup) -> text

selectolax (lexbor) parses it by the HTML standard's algorithm, so broken markup means what it means
in a browser. Left out is what a browser doesn't show: scripts, styles, templates, comments, the
head but for the title, what is there in case scripts, frames or media don't work, and elements
marked `hidden`. Style sheets are not applied.

A run of white space counts as one space, except within `<pre>`. Blocks are separated by a line's
end or an empty line, the cells of a row by a tab. U+00A0 is kept, as HTML doesn't collapse it.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

DEEPEST = 1000  # elements within one another: browsers cut at 512, lexbor's time grows as depth²
COPIES = 1_000_000  # elements such as <b> that stay open are copied into each later block
ATTRIBUTES = 5000  # of one tag; lexbor's time grows as their square

_HIDDEN = frozenset(
    "script style template noscript noframes noembed iframe audio video canvas datalist "
    "annotation annotation-xml metadata desc defs".split()
)
_LINES = frozenset(
    "li tr dt dd title caption thead tbody tfoot option optgroup legend summary figcaption "
    "frameset".split()
)
_PARAGRAPHS = frozenset(
    "p div h1 h2 h3 h4 h5 h6 ul ol dl menu dir table pre listing xmp plaintext blockquote section "
    "article aside nav header footer main address figure details dialog fieldset form hgroup "
    "search center hr body marquee".split()
)
_LINE_ENDS = dict.fromkeys(_LINES, 1) | dict.fromkeys(_PARAGRAPHS, 2)
_BETWEEN = {"td": "\t", "th": "\t"} | dict.fromkeys("button select textarea text".split(), " ")
_VERBATIM = frozenset("pre listing xmp plaintext textarea".split())
_LAID_OUT = frozenset(_LINE_ENDS) | frozenset(_BETWEEN) | _VERBATIM | {"br"}
_SPACE = re.compile(r"[ \t\n\r\f]+")

_TAG = re.compile(r"<(?:(!--)|(/?)([a-zA-Z][^\s/>]*)([^>]*))")
_REMEDY = "; correct the page or leave it out"
_CHARSET = re.compile(rb"<meta\b[^>]*?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_QUOTED = re.compile("\"[^\"]*\"|'[^']*'")
_RAW = {
    name: re.compile(f"</{name}", re.IGNORECASE)
    for name in "script style textarea title xmp iframe noembed noframes noscript".split()
} | {"!--": re.compile("-->")}
_NEVER_DEEP = frozenset(  # without content, or closed by the next of their kind
    "area base br col embed hr img input link meta param source track wbr p li dt dd td th tr "
    "thead tbody tfoot colgroup option optgroup rp rt rb rtc html head body".split()
)
_NEVER_NESTED = frozenset("a nobr button form".split())
_FORMATTING = frozenset("b big code em font i s small strike strong tt u".split())


class PageError(ValueError):
    """What is wrong with a page, and what to do."""


def page_text(raw: bytes, *, marked: bool = False) -> str:
    """A page's bytes, which are UTF-8, as text; `marked`: a byte-order mark says so.

    Raises:
        PageError: not UTF-8, or its <meta> names another encoding, in which it reads otherwise.
    """
    match = _CHARSET.search(raw[:1024])  # browsers look no further
    encoding = match[1].decode() if match else "utf-8"
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        said = f" (its <meta> says {encoding})" if match else ""
        raise PageError(
            f"byte {error.start + 3 * marked} is not UTF-8 text{said}; convert the file to UTF-8"
        ) from None
    # UTF-16 in a <meta> that can be read as ASCII can't be true: browsers take UTF-8.
    if not marked and not encoding.lower().startswith(("utf", "unicode")):
        try:
            other = raw.decode(encoding, "replace")
        except (LookupError, ValueError):  # there is no such encoding
            other = text
        if other != text:
            raise PageError(
                f"its <meta> says {encoding}; convert the file to UTF-8 and correct the <meta>, "
                "or only that where the file is UTF-8 already"
            )
    return text


def visible_text(page: str) -> str:
    """The text of a page, without line ends around it; "" where it shows none.

    Raises:
        PageError: elements stand within one another more than `DEEPEST` deep, or so many are
            never closed that the parser would make more than `COPIES` of them.
    """
    from selectolax.lexbor import LexborHTMLParser

    _check_depth(page)
    parser = LexborHTMLParser(page, scripting=True)
    layout = _Layout()
    for tag, text, begins in _walk(parser):
        if text is not None:
            layout.text(text)
        elif tag in _LAID_OUT:
            (layout.begin if begins else layout.end)(tag)
    return "".join(layout.parts).strip("\r\n").rstrip(" ")


def _walk(parser: Any) -> Iterator[tuple[str, str | None, bool]]:
    """(tag, text of a text node, whether an element begins) in order; no recursion."""
    marked = {node.mem_id for node in parser.css("[hidden]")}
    node, above = parser.root, []
    while node is not None:
        tag = node.tag
        if tag == "-text":
            yield tag, node.text_content, True
        elif tag not in _HIDDEN and not (marked and node.mem_id in marked):
            yield tag, None, True
            if (child := node.child) is not None:
                above.append((node, tag))
                node = child
                continue
            yield tag, None, False
        while (following := node.next) is None and above:
            node, tag = above.pop()
            yield tag, None, False
        node = following


class _Layout:
    """Puts text together; what separates it is decided when the next text comes."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.line_ends = 0  # before the next text
        self.between = ""  # the same, where no line ends
        self.verbatim = 0  # how many <pre> are open

    def begin(self, tag: str) -> None:
        if tag == "br" and self.verbatim:
            self.text("\n")
        elif tag == "br":
            self.line_ends = min(2, self.line_ends + 1)
        self._separate(tag)
        self.verbatim += tag in _VERBATIM

    def end(self, tag: str) -> None:
        self.verbatim -= tag in _VERBATIM
        self._separate(tag)

    def _separate(self, tag: str) -> None:
        self.line_ends = max(self.line_ends, _LINE_ENDS.get(tag, 0))
        self.between = self.between or _BETWEEN.get(tag, "")

    def text(self, text: str) -> None:
        if not self.verbatim:
            text = _SPACE.sub(" ", text)
            if self.line_ends or not self.parts or self.parts[-1].endswith((" ", "\t", "\n")):
                text = text.lstrip(" ")
        if not text:
            return
        if self.parts and (self.line_ends or self.between):
            self.parts[-1] = self.parts[-1].rstrip(" ")
            ends = self.line_ends - self.parts[-1].endswith("\n")  # of a <pre>
            self.parts.append("\n" * ends if self.line_ends else self.between)
        self.parts.append(text)
        self.line_ends, self.between = 0, ""


def _check_depth(page: str) -> None:
    """Counts what is left open, before the parser runs, which nothing can interrupt."""
    still_open: Counter[str] = Counter()
    depth = formatting = copies = place = 0
    raw, unclosed = dict(_RAW), ""
    while match := _TAG.search(page, place):
        place = match.end()
        comment, closes, name, rest = match.groups()
        name = comment or name.lower()
        if name in raw and not closes:
            # "<!-->" is a comment, so that its end may begin within what was matched.
            if found := raw[name].search(page, match.start() + 2 if comment else place):
                place = found.start() + (3 if comment else 0)
            else:  # never closed; not searched for again
                del raw[name]
        if len(rest or "") > 2 * ATTRIBUTES and len(_QUOTED.sub("", rest).split()) > ATTRIBUTES:
            raise PageError(f"<{name}> has more than {ATTRIBUTES:,} attributes{_REMEDY}")
        copies += formatting if formatting > 16 and not closes else 0
        if copies > COPIES:
            raise PageError(f"{formatting:,} elements are never closed, as <{unclosed}>{_REMEDY}")
        if name in _NEVER_DEEP or name in _RAW:
            continue
        if closes:
            step = -1 if still_open[name] else 0
        elif name in _NEVER_NESTED and still_open[name]:
            step = 0
        else:
            step = 0 if rest.endswith("/") and (still_open["svg"] or still_open["math"]) else 1
        still_open[name] += step
        depth += step
        if name in _FORMATTING:
            formatting, unclosed = formatting + step, name
        if depth > DEEPEST:
            raise PageError(
                f"more than {DEEPEST:,} elements within one another, as <{name}>{_REMEDY}"
            )
