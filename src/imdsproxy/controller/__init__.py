"""The process of `imdsproxy run`: what is made of the settings, in which order it starts, and how it ends."""
