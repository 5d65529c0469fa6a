"""The web pages: the same service for people, under the same keys, rules and limits as the API."""

from holdtrue.service.web.pages import answer
from holdtrue.service.web.routes import install

__all__ = ["answer", "install"]
