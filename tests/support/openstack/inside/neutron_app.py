"""Neutron's WSGI application with its policy loaded; runs in Neutron's environment, under uWSGI.

By itself Neutron loads it in the thread of the first request. Until that is done, other threads show and allow
nothing, though they answer 200 to lists.
"""

from neutron import policy
from neutron.wsgi.api import application

__all__ = ["application"]

policy.init()
