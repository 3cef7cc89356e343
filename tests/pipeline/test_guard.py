"""Who may be called: public addresses under plain names, and nothing else unless allowed."""

from ipaddress import ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.web.config import Blocklist, FetchConfig
from pipeline.web.failures import FailureReason, FetchError
from pipeline.web.guard import Guard, is_public, parse_target, redirect_url
from pipeline.web.robots import forbidding_directive, parse_robots


def refusal(url, **config):
    """The reason a guard refuses a URL for, None when it lets it pass."""
    try:
        Guard(FetchConfig(**config)).vet_url(url)
    except FetchError as error:
        return error.reason
    return None


REFUSED_ADDRESSES = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1",
    "172.31.255.255", "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200",
    "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9", "224.0.0.1",
    "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.88.99.1", "168.63.129.16",
    "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::8.8.8.8",
    "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "2002:7f00:1::", "2002:808:808::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "3fff::1", "5f00::1", "100::1",
    "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1",
]  # fmt: skip
PUBLIC_ADDRESSES = ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111"]


@pytest.mark.parametrize("address", REFUSED_ADDRESSES)
def test_an_address_with_a_special_purpose_is_refused(address):
    assert not is_public(ip_address(address))
    with pytest.raises(FetchError) as failed:
        Guard(FetchConfig()).vet_addresses("name.example", ["8.8.8.8", address])
    assert failed.value.reason is FailureReason.ADDRESS_REFUSED


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_a_public_address_may_be_called(address):
    assert is_public(ip_address(address))
    assert Guard(FetchConfig()).vet_addresses("name.example", [address]) == [ip_address(address)]


@given(st.ip_addresses(v=4))
def test_whatever_python_calls_private_is_refused(address):
    if address.is_private or address.is_multicast or address.is_reserved:
        assert not is_public(address)


@given(st.ip_addresses(v=4))
def test_no_ipv6_form_of_an_ipv4_address_is_public(address):
    number = int(address)
    for embedded in (
        number,  # IPv4-compatible
        0xFFFF << 32 | number,  # IPv4-mapped
        0x64FF9B << 96 | number,  # NAT64
        0x2002 << 112 | number << 80,  # 6to4
        0x20010000 << 96 | (number ^ 0xFFFFFFFF),  # Teredo
    ):
        assert not is_public(ip_address(embedded.to_bytes(16, "big")))


ODD_HOSTS = [
    "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "017700000001", "127.1", "127.0.1",
    "0", "0x", "127.0.0.1.", "2130706433.", "127.0.0.01", "1.1.1.1.1", "name.1", "256.1.1.1",
    "①②⑦.⓪.⓪.①", "１２７.0.0.1", "127。0。0。1", "127．0．0．1", "٨.8.8.8", "127.0.0.١",
    "a..b", ".a", "a b", "exa%6dple.org", "a,b", "x" * 64 + ".org", "a." * 127 + "toolong",
    "[fe80::1%25eth0]", "[::1%lo]", "\u202e.org", "a\u2028b.org",
]  # fmt: skip


@pytest.mark.parametrize("host", ODD_HOSTS)
def test_a_host_in_an_odd_encoding_is_refused_unresolved(host):
    assert refusal(f"http://{host}/") in (FailureReason.HOST_REFUSED, FailureReason.BAD_URL)


@pytest.mark.parametrize("host", ["127.0.0.1", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]"])
def test_a_literal_private_address_is_refused(host):
    assert refusal(f"http://{host}/") is FailureReason.ADDRESS_REFUSED
    assert refusal(f"http://user:secret@{host}:80/") is FailureReason.ADDRESS_REFUSED


def test_only_what_is_allowed_is_allowed():
    allowed = {"allowed_networks": ("127.0.0.1/32",), "allowed_ports": (8123,)}
    assert refusal("http://127.0.0.1:8123/", **allowed) is None
    assert refusal("http://127.0.0.2:8123/", **allowed) is FailureReason.ADDRESS_REFUSED
    assert refusal("http://127.0.0.1:8124/", **allowed) is FailureReason.PORT_REFUSED
    assert refusal("http://[::ffff:127.0.0.1]:8123/", **allowed) is FailureReason.ADDRESS_REFUSED
    assert refusal("http://example.org:22/") is FailureReason.PORT_REFUSED
    assert refusal("http://example.org:22/", allowed_ports="any") is None


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://x.org/a", "data:image/png;base64,AA", "gopher://x.org/", "FILE:x",
     "javascript:alert(1)", "jar:http://x.org!/", "unix:/run/s", "//x.org/a", "x.org/a", "", "?"],
)  # fmt: skip
def test_other_schemes_are_refused(url):
    assert refusal(url) is FailureReason.SCHEME_REFUSED


@pytest.mark.parametrize(
    "url",
    ["http://x.org/a\r\nHost: evil", "http://x.org/\0", "http://x\n.org/", "http://x.org/\t",
     "http://", "http:///a", "http://x.org:99999/", "http://x.org:0/", "http://x.org:a/",
     "http://[::1", "http://[1::2::3]/", "http://x.org/\ud800", "http://good.org\\@evil.org/",
     "http://a\u2100b/"],
)  # fmt: skip
def test_a_broken_url_is_refused(url):
    assert refusal(url + "x" if url.endswith("\t") else url) is FailureReason.BAD_URL


def test_a_long_url_is_refused_without_being_read():
    assert refusal("http://x.org/" + "a" * 2**20) is FailureReason.URL_TOO_LONG


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("HTTP://Example.ORG", "http://example.org/"),
        (" https://x.org:443/a b?c=d e#frag ", "https://x.org/a%20b?c=d%20e"),
        ("http://user:pass@x.org:8080/a", "http://x.org:8080/a"),
        ("http://x.org./é?ü=1", "http://x.org/%C3%A9?%C3%BC=1"),
        ("http://bücher.example/%41", "http://xn--bcher-kva.example/%41"),
        ("http://my_photos.example.org/", "http://my_photos.example.org/"),
        ("http://[2606:4700:0::1111]/", "http://[2606:4700::1111]/"),
        ("http://8.8.8.8:80/\\", "http://8.8.8.8/%5C"),
    ],
)
def test_a_url_has_one_normal_form_without_credentials_and_fragment(url, normal):
    target = parse_target(url, max_chars=8192)
    assert target.url == normal
    assert parse_target(normal, max_chars=8192) == target


@given(st.text())
@example("http://ⓔxample.org")
def test_any_text_is_parsed_or_refused(text):
    for url in (text, "http://" + text, "http://x.org/" + text, "https://x.org:" + text):
        try:
            target = parse_target(url, max_chars=8192)
        except FetchError:
            continue
        assert target.url.isascii()
        assert not set("\r\n\0 ") & set(target.host_header + target.path)


def test_a_redirect_keeps_the_servers_bytes():
    base = parse_target("http://x.org/a/b?c", max_chars=8192)
    # "é" in UTF-8, as http.client hands it over.
    assert redirect_url(base, "../d/Ã©") == "http://x.org/d/%C3%A9"
    assert redirect_url(base, "//y.org/e") == "http://y.org/e"
    assert redirect_url(base, "https://z.org/%41") == "https://z.org/%41"


def test_blocked_domains_cover_their_subdomains_and_urls_their_spellings():
    blocked = {
        "blocklist": Blocklist(
            domains=("Evil.example", "*.bücher.example"), urls=("http://x.org/a b",)
        )
    }
    for url in ("http://evil.example/", "http://EVIL.example./", "https://a.b.evil.example/x"):
        assert refusal(url, **blocked) is FailureReason.BLOCKED_DOMAIN
    assert refusal("http://www.xn--bcher-kva.example/", **blocked) is FailureReason.BLOCKED_DOMAIN
    assert refusal("http://notevil.example/", **blocked) is None
    assert refusal("http://u:p@X.org:80/a%20b#c", **blocked) is FailureReason.BLOCKED_URL
    assert refusal("http://x.org/ab", **blocked) is None
    with pytest.raises(ValueError, match="is no domain"):
        Guard(FetchConfig(blocklist=Blocklist(domains=("not a domain",))))


def test_a_config_that_cannot_work_is_refused():
    for wrong in (
        {"timeout_seconds": 0}, {"timeout_seconds": 90}, {"user_agent": "a\r\nCookie: b"},
        {"allowed_networks": ("10.0.0.1/8",)}, {"max_redirect": 3},
        {"blocklist": {"image_sha256": ("abc",)}},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            FetchConfig(**wrong)
    assert FetchConfig.model_validate_json(FetchConfig().model_dump_json()) == FetchConfig()


ROBOTS = """
# comment
User-agent: *
Disallow: /private
Allow: /private/open   # narrower
Disallow: /*.gif$

User-Agent: Other
User-agent: CapFilt
Disallow: /images/*/full
Crawl-delay: 1
Allow:

User-agent: capfilt
Disallow: /also
"""


@pytest.mark.parametrize(
    ("token", "path", "is_allowed"),
    [
        ("someone", "/private/x", False), ("someone", "/private/open/x", True),
        ("someone", "/a.gif", False), ("someone", "/a.gif?x", True), ("someone", "/images/1", True),
        ("capfilt", "/private/x", True), ("capfilt", "/images/1/full.jpg", False),
        ("capfilt", "/images/full", True), ("capfilt", "/also", False), ("capfilt", "/", True),
    ],
)  # fmt: skip
def test_robots_txt_follows_the_longest_match_for_our_name(token, path, is_allowed):
    assert parse_robots(ROBOTS, token).allow(path) is is_allowed


def test_a_robots_pattern_full_of_stars_is_matched_at_once():
    rules = parse_robots("User-agent: *\nDisallow: /" + "*a" * 2000 + "$", "capfilt")
    assert rules.allow("/" + "a" * 8000 + "b")


@given(
    st.text(alphabet="abU*$:-/#\n\t \ufeff", max_size=200), st.text(alphabet="/ab*$", max_size=9)
)
def test_any_robots_txt_gives_an_answer(text, path):
    rules = parse_robots("user-agent: *\ndisallow: " + text, "capfilt")
    assert rules.allow("/" + path) in (True, False)


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        (["noai"], "noai"), (["index, NoImageAI"], "noimageai"), (["nofollow"], None),
        (["none"], "none"), (["otherbot: noai"], None), (["capfilt: noai"], "noai"),
        (["CapFilt: nofollow, noindex"], "noindex"), (["otherbot: noai, noindex"], None),
        (["nofollow", "noindex"], "noindex"), (["*: noai"], "noai"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noindex"], "noindex"),
        (["max-snippet: 5, noai"], "noai"), ([",,: ,"], None),
    ],
)  # fmt: skip
def test_x_robots_tag_directives_for_us_are_found(headers, found):
    disallowed = frozenset(FetchConfig().disallowed_header_directives)
    assert forbidding_directive(headers, "capfilt", disallowed) == found
