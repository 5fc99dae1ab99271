"""APIs for operators and monitoring, on a host and on a hub: routes, bodies, health, metrics, and the client."""
