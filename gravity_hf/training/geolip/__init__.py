"""Training a geolip: on features of text, on images, and on data in memory."""
