"""HTTP without Ray: what is said over it, who may, and how a server listens.

protocol.py  the JSON of a reward server: bounds, pictures, scores, refusals
token.py     the bearer token: where it comes from, who knows it, and what is loopback
client.py    the one HTTP client: proxies, redirects, and who may see the token
front.py     an ASGI application that refuses before it reads, and the socket it listens on

May import core alone.
"""
