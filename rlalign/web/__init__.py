"""HTTP without Ray: what is said over it, who may, and how a server listens.

protocol.py  the JSON of a reward server: bounds, pictures, scores, refusals
token.py     the bearer token: where it comes from, who knows it, and what is loopback
client.py    the one HTTP client: proxies, redirects, and who may see the token
refused.py   a request that is not served, and what the client is told
listening.py the socket, the certificate and the bounds of a server of ours
front.py     the reward server's ASGI application, which refuses before it reads
vote/        the page where people choose, over rlalign/ballots

May import core, and vote/ ballots.
"""
