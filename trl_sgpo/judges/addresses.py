"""
The addresses of a judge's servers: what is accepted as one ([`checked_urls`]), and the proxy that the environment
names for it ([`proxy_for`]).
"""

import ipaddress
import re
import socket
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit


# What the judge or its user puts behind the address of a server
_ROUTE = re.compile(
    r"(?:/chat/completions|/completions|/responses|/pooling|/classify|/embeddings|(?<=/v\d)/models)/*\Z"
)


def checked_urls(base_url: Any) -> tuple[str, ...]:
    """
    The addresses, checked, and without the route of a request (`/chat/completions`, `/pooling`) at their end. No part
    of an address is printed before it is known to hold no credentials.
    """
    urls = [base_url] if isinstance(base_url, str) else base_url
    if not isinstance(urls, Sequence) or not urls or not all(isinstance(url, str) for url in urls):
        raise TypeError(f"base_url is of type {type(base_url).__name__}, or empty. Give an address or a list of them.")
    urls = [url.strip() for url in urls]
    for url in urls:
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError:
            raise ValueError("base_url holds no valid address. Give 'http://localhost:8000/v1', say.") from None
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "base_url (not shown here) holds credentials or a query, which would end up in logs. Give the plain "
                "address, and the key in the environment variable that `api_key_env` names."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url={url!r} is no http(s) address, such as 'http://localhost:8000/v1'.")
    return tuple(dict.fromkeys(_ROUTE.sub("", url).rstrip("/") for url in urls))


def proxy_for(url: str) -> str | None:
    """
    The proxy that the environment names for an address, `None` for none. This machine is never asked through one. A
    `ValueError` if it is a proxy that the HTTP client cannot use.
    """
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or _is_this_machine(parts.hostname or "") or _is_exempt(parts, proxies.get("no") or ""):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    scheme = proxy.partition("://")[0].lower()
    if scheme not in ("http", "https"):
        name = f"{parts.scheme}_proxy" if proxies.get(parts.scheme) else "all_proxy"
        raise ValueError(
            f"The environment variable {name} (or {name.upper()}) names a proxy of the kind {scheme!r} for "
            f"base_url={url!r}, and the HTTP client knows 'http' and 'https' only. If the server can be reached without "
            f"a proxy, write no_proxy={parts.hostname}. Otherwise name an HTTP proxy, {parts.scheme}_proxy=http://..."
        )
    return proxy


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that a host is given by, if it is; of IPv4 also if it is written as one of IPv6."""
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_this_machine(host: str) -> bool:
    address = _address(host)
    if address is not None:
        if address.is_loopback or address.is_unspecified:
            return True
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        try:  # only an address of this machine can be bound; nothing is sent
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.bind((str(address), 0))
            return True
        except OSError:
            return False
    host, own = host.lower().rstrip("."), socket.gethostname().lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    short = own.partition(".")[0]
    if not own or host.partition(".")[0] != short:
        return False
    if host in (own, short, f"{short}.local"):
        return True
    try:  # its name with a domain, or the name of another machine in another domain
        return any(_is_this_machine(str(found[4][0])) for found in socket.getaddrinfo(host, None))
    except OSError:
        return False


def _is_exempt(parts: SplitResult, no_proxy: str) -> bool:
    """
    Whether `no_proxy` holds the address. Python's own matcher knows names and suffixes of names. curl and programs in
    Go also know networks, ports, `*.name` and a `*` among others, so the variables of many machines hold these.
    """
    host = (parts.hostname or "").lower()
    if urllib.request.proxy_bypass(host):
        return True
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    address = _address(host)
    for entry in re.split(r"[,\s]+", no_proxy.lower()):
        name, _, own_port = entry.rpartition(":") if re.search(r"^[^:]+:\d+$|\]:\d+$", entry) else (entry, "", "")
        if not name or (own_port and own_port != str(port)):
            continue
        if address is None:
            name = name.removeprefix("*").lstrip(".")
            if not name or host == name or host.endswith(f".{name}"):
                return True
        elif name == "*":
            return True
        else:
            try:
                network = ipaddress.ip_network(name.strip("[]"), strict=False)
            except ValueError:
                continue
            if address in network:
                return True
    return False
