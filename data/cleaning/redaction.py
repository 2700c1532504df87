"""Replaces e-mail addresses and keys by StarCoder's markers, and public IP addresses by private ones.

The addresses of well-known DNS servers stay. Keys and tokens are found by detect-secrets' detectors of known forms
(AWS, GitHub, Slack, JSON web tokens, passwords in URLs, …); the lines of a PEM private key are keys too. Detectors of
high entropy are left out, because most of what they find in source code is not a secret. Names and passwords, which
StarCoder found with a model, are not looked for.

Python that parses before redaction parses after it: where it would not, only strings and comments are redacted.
"""

import ast
import io
import ipaddress
import re
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from runtime.errors import UserError

EMAIL_DOMAIN = re.compile(r"@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}(?![\w-])")  # begins with "@", which is rare: faster
EMAIL_NAME = re.compile(r"[A-Za-z0-9_][\w.+-]{0,63}\Z")
NOBODY = re.compile(r"git@|.*@(?:.*\.)?example\.(?:com|org|net)$", re.IGNORECASE)
IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
VERSION = re.compile(r"v(?:er(?:sion)?)?[\W_]{0,8}$", re.IGNORECASE)
PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY[A-Z ]*-----(.{1,20000}?)-----END", re.DOTALL)
REST_OF_TOKEN = re.compile(r"[\w+/=-]{0,500}", re.ASCII)  # a detector's match may end before the key does
PEM_LINE = re.compile(r"[A-Za-z0-9+/=]{16,}")
IPV4_HINT = re.compile(r"\.\d{1,3}\.\d")
IPV6_HINT = re.compile(r":[0-9A-Fa-f]{0,4}:")
# A detector is skipped for texts without one of its words, in lower case. These words and the hints above make
# redaction six times as fast. Without its word, npm's pattern would take minutes for 300,000 slashes.
COMES_WITH = {
    "AWSKeyDetector": ("a3t", "abia", "acca", "akia", "asia", "aws"),
    "CloudantDetector": ("cloudant",),
    "DiscordBotTokenDetector": ("discord", "token"),
    "IbmCloudIamDetector": ("ibm",),
    "IbmCosHmacDetector": ("ibm",),
    "MailchimpDetector": ("-us",),
    "NpmDetector": (":_authtoken",),
    "SlackDetector": ("xox", "hooks.slack.com"),
    "SoftlayerDetector": ("softlayer",),
    "StripeDetector": ("k_live_",),
    "TelegramBotTokenDetector": ("telegram", "bot", "token"),
}
DNS_SERVERS = frozenset(
    ipaddress.ip_address(address)
    for address in (
        *("8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "149.112.112.112", "208.67.222.222", "208.67.220.220"),
        *("4.2.2.1", "4.2.2.2", "64.6.64.6", "64.6.65.6", "77.88.8.8", "77.88.8.1", "114.114.114.114", "8.26.56.26"),
        *("2001:4860:4860::8888", "2001:4860:4860::8844", "2606:4700:4700::1111", "2606:4700:4700::1001"),
        *("2620:fe::fe", "2620:fe::9", "2620:119:35::35", "2620:119:53::53"),
    )
)


class Finding(NamedTuple):
    start: int
    end: int
    kind: str  # email, ipv4, ipv6 or key


class Redactor:
    """Finds and replaces personal data and secrets. Raises UserError if detect-secrets is not installed."""

    def __init__(self) -> None:
        try:
            from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
            from detect_secrets.plugins.base import RegexBasedDetector
        except ImportError:
            raise UserError("--redact: needs detect-secrets; install it with: pip install detect-secrets") from None
        # This module finds the first two; the third takes every word that begins with APA to APF for a key.
        left_out = ("Public IP (ipv4)", "Private Key", "Artifactory Credentials")
        self.detectors = [
            detector()
            for kind, detector in sorted(get_mapping_from_secret_type_to_class().items())
            if issubclass(detector, RegexBasedDetector) and kind not in left_out
        ]

    def redact(self, text: str, language: str | None) -> tuple[str, Counter[str]] | None:
        """The redacted text and the number of replacements of each kind; None for Python that would no longer parse."""
        if text.startswith("\ufeff"):  # a byte order mark, which Python's parser does not accept in a str
            result = self.redact(text[1:], language)
            return None if result is None else ("\ufeff" + result[0], result[1])
        findings = self.find(text)
        redacted = _replace(text, findings)
        if findings and language == "Python" and not _parses(redacted) and _parses(text):
            spans = _strings_and_comments(text)
            findings = [f for f in findings if any(start <= f.start and f.end <= end for start, end in spans)]
            redacted = _replace(text, findings)
            if not _parses(redacted):
                return None
        return redacted, Counter(finding.kind for finding in findings)

    def find(self, text: str) -> list[Finding]:
        """What to replace, in order and without overlaps. Of findings that overlap the one that starts first is kept;
        at the same start a key comes first, then the longest."""
        candidates = [*_emails(text), *_addresses(text), *self._keys(text)]
        candidates.sort(key=lambda finding: (finding.start, finding.kind != "key", -finding.end))
        findings: list[Finding] = []
        for candidate in candidates:
            if not findings or candidate.start >= findings[-1].end:
                findings.append(candidate)
        return findings

    def _keys(self, text: str) -> Iterator[Finding]:
        for block in PEM.finditer(text):
            lines = PEM_LINE.finditer(text, block.start(1), block.end(1))
            yield from (Finding(*line.span(), "key") for line in lines)
        lower = text.lower()
        for detector in self.detectors:
            words = COMES_WITH.get(type(detector).__name__)
            if words is not None and not any(word in lower for word in words):
                continue
            for pattern in detector.denylist:
                for match in pattern.finditer(text):
                    # Group 1 is the secret itself, unless it begins the match, as GitHub's "ghp" does.
                    group = 1 if pattern.groups > 0 and match.start(1) > match.start() else 0
                    yield Finding(match.start(group), REST_OF_TOKEN.match(text, match.end(group)).end(), "key")


def _emails(text: str) -> Iterator[Finding]:
    for domain in EMAIL_DOMAIN.finditer(text):
        name = EMAIL_NAME.search(text, max(0, domain.start() - 64), domain.start())
        if name and not NOBODY.match(name[0] + domain[0]):
            yield Finding(name.start(), domain.end(), "email")


def _addresses(text: str) -> Iterator[Finding]:
    if IPV4_HINT.search(text):
        for match in IPV4.finditer(text):
            if _is_public(match[0]) and not VERSION.search(text, max(0, match.start() - 16), match.start()):
                yield Finding(*match.span(), "ipv4")
    if IPV6_HINT.search(text):
        for match in IPV6.finditer(text):
            groups = match[0].replace("::", ":").strip(":").split(":")
            if len(groups) > 2 and _is_public(match[0]):  # the 1::2 in x[1::2] is no address
                yield Finding(*match.span(), "ipv6")


def _is_public(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return ip.is_global and ip not in DNS_SERVERS


def _replace(text: str, findings: list[Finding]) -> str:
    """The text with the findings replaced. Equal addresses are replaced by equal private ones."""
    numbers: dict[str, int] = {}
    pieces, end = [], 0
    for finding in findings:
        number = numbers.setdefault(text[finding.start : finding.end], len(numbers) + 1)
        replacements = {
            "email": "<EMAIL>",
            "key": "<KEY>",
            "ipv4": f"10.0.{number // 254 % 256}.{number % 254 + 1}",
            "ipv6": f"fd00::{number:x}",
        }
        pieces += [text[end : finding.start], replacements[finding.kind]]
        end = finding.end
    return "".join([*pieces, text[end:]])


def _parses(text: str) -> bool:
    with warnings.catch_warnings(), suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        warnings.simplefilter("ignore")
        ast.parse(text)
        return True
    return False


def _strings_and_comments(text: str) -> list[tuple[int, int]]:
    """The start and end of each string and comment in Python code."""
    line_starts = [0]
    for line in io.StringIO(text, newline=""):  # counts lines as tokenize does
        line_starts.append(line_starts[-1] + len(line))
    kinds = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", None)}
    spans = []
    with suppress(tokenize.TokenError, SyntaxError):  # after an error the spans found so far are returned
        for token in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
            if token.type in kinds:
                (row, column), (last_row, last_column) = token.start, token.end
                spans.append((line_starts[row - 1] + column, line_starts[last_row - 1] + last_column))
    return spans
