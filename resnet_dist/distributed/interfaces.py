"""The network interfaces of this machine: which are up, and whether an address has a route."""

import fcntl
import socket
import struct

# From Linux's <linux/sockios.h> and <net/if.h>.
_SIOCGIFFLAGS = 0x8913
_IFF_UP = 1

# struct ifreq: a name of 16 bytes, and a union of 24 bytes that begins with the flags.
_REQUEST = struct.Struct("16sH22x")


def interfaces_that_are_up() -> list[str]:
    """Names of the network interfaces that are up."""
    found = []
    for _, name in socket.if_nameindex():
        if _is_up(name):
            found.append(name)
    return found


def _is_up(name: str) -> bool:
    """Ask the kernel for the flags of an interface; one that has gone is not up."""
    request = _REQUEST.pack(name.encode(), 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request)
        except OSError:
            return False
    _, flags = _REQUEST.unpack(answer)
    return bool(flags & _IFF_UP)


def list_interfaces() -> str:
    """The interfaces that are up, for a message."""
    names = interfaces_that_are_up()
    if not names:
        return "none (`ip link set lo up` starts loopback)"
    return ", ".join(names)


def check_route(address: str, port: int) -> None:
    """Check that the kernel knows a way to an address. Nothing is sent.

    Raises:
        OSError: There is none, for instance because all network interfaces are down.
    """
    answers = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, place = answers[0]
    with socket.socket(family, kind, protocol) as datagrams:
        datagrams.connect(place)
