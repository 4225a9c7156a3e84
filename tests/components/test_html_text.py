"""What reading a web page promises: a browser's text, and an end to it."""

from __future__ import annotations

import pytest

from components.html_text import PageError, page_text, visible_text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<table><tr><td>a<td>b<tr><th>c<th>d</table>e", "a\tb\nc\td\n\ne"),
        ("<table><tr> <td> a </td> <td></td> <td><p>b</p></td></tr></table>", "a\n\nb"),
        ("<select><option>one<option>two</select>", "one\ntwo"),
        ("<dl><dt>a<dd>b</dl><p>x<br>y<br/><br>z", "a\nb\n\nx\ny\n\nz"),
        ("a<button>b</button><textarea>\nc\n d</textarea>e", "a b c\n d e"),
        ("a<hr>b<div>c</div>d<div><div>e", "a\n\nb\n\nc\n\nd\n\ne"),
        ("x <b> y</b>\n<i>z </i>", "x y z"),
        ("a&amp;b &lt;i&gt;&nbsp;&eacute;&#x1F642;&notin;", "a&b <i>\xa0é\U0001f642∉"),
        ("<pre>\n a\n\n\n\n b <b>c</b><br>d\n</pre>e", " a\n\n\n\n b c\nd\n\ne"),
        ("<title>T</title><meta name=x><body>b", "T\n\nb"),
        ("a<!-- b --><!---->c<!-->d<!d>e<?f?>g</>h</ i>j", "acdeghj"),
        ("a<script>'<p>'</script><style>b{}</style><template>c</template>d", "ad"),
        ("a<noscript>b</noscript><iframe>c</iframe><video>d</video><p hidden>e<p>f", "a\n\nf"),
        ("<p>a<div>b</p>c</div></b></p>d", "a\n\nb\n\nc\n\nd"),
        ("<b><p>a</b>b</p><a href='>'>c<a d", "a" "b\n\nc"),
        ("a\0b<p>c\r\nd", "ab\n\nc d"),
        ("x < y <3 & z<", "x < y <3 & z<"),
        ("<svg><path/><text>a</text><text>b</text></svg><math><mi>c</math>", "a b c"),
        ("(?<![a-z]word) is.</p><p>it<![own]>, x<![if !m]>y<![endif]>z", "(?\n\nit, xyz"),
        ("plain", "plain"), ("", ""), ("<p> \n", ""),
    ],
)  # fmt: skip
def test_a_page_reads_as_a_browser_shows_it(page: str, text: str) -> None:
    assert visible_text(page) == text


@pytest.mark.parametrize(
    "tag",
    "address article aside blockquote caption center dd details dialog dir div dl dt fieldset "
    "figcaption figure footer form h1 h2 h3 h4 h5 h6 header hgroup legend li listing main menu nav "
    "ol optgroup option p pre search section summary table td th tr ul xmp".split(),
)
def test_words_of_neighbouring_blocks_are_apart(tag: str) -> None:
    around = {"caption": "table", "td": "table", "th": "table", "tr": "table"}.get(tag, "div")
    inner = {"table": "<td>", "tr": "<td>"}.get(tag, "")
    block = f"<{tag}>{inner}two</{tag}>"
    page = f"one<{around}>{block}{block}</{around}>three"
    assert visible_text(page).split()[:3] == ["one", "two", "two"]
    assert visible_text(page).split()[-1] == "three"


@pytest.mark.parametrize(
    "page",
    [
        "<div>" * 10**6,
        "<p><span><b>" * 10**5 + "x",
        "<select>" * 10**5,
        "<table><tr><td>" * 10**5,
        "".join(f"<p><b id={i}>" for i in range(10**4)),
        "<a " + " ".join(f"b{i}=1" for i in range(10**5)) + ">",
        "<!--" * 1001 + "<div>" * 1001,
    ],
)
def test_what_would_stop_the_parser_is_refused_at_once(page: str) -> None:
    with pytest.raises(PageError, match="correct the page or leave it out"):
        visible_text(page)


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("<p>x<li>x" * 3000, 6000),
        ("<a name=b>x " * 3000, 3000),
        ("<svg>" + "<path d='1 2'/>" * 3000 + "</svg>x", 1),
        ("<script>" + "'<div>' + " * 3000 + "</script>x", 1),
        ("<div>" * 900 + "x" + "</div>" * 900, 1),
        ("<img alt='" + "a b " * 9000 + "'>x", 1),
        ("<hr><br>x" * 3000, 3000),
    ],
)
def test_long_but_flat_pages_are_read(page: str, words: int) -> None:
    assert len(visible_text(page).split()) == words


def test_a_page_that_names_another_encoding_is_not_misread() -> None:
    latin, meta = (
        "<meta charset='ISO-8859-1'>",
        "<meta http-equiv=x content='text/html; charset=%s'>",
    )
    assert page_text(f"{latin}plain".encode()).endswith("plain")
    assert page_text(f"{latin}é".encode(), marked=True).endswith("é")
    for named in ("utf-8", "UTF8", "utf-16", "unknown-8"):
        assert page_text(f"{meta % named}é".encode()).endswith("é")
    with pytest.raises(PageError, match="its <meta> says ISO-8859-1; convert the file to UTF-8"):
        page_text(f"{latin}é".encode())
    with pytest.raises(PageError, match=r"its <meta> says iso-2022-jp"):
        page_text((meta % "iso-2022-jp").encode() + "日本".encode("iso-2022-jp"))
    with pytest.raises(PageError, match=r"byte 1 is not UTF-8 text; convert"):
        page_text(b"x\xff")
