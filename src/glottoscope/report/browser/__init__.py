"""The browser of features: every file of the site, made from a run directory, for the server and for the export alike."""
