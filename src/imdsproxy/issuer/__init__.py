"""Identity tokens: claims, keys, the signer, and the process that answers guests; no policy and no HAProxy."""
