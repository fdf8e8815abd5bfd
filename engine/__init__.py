"""The decoupled serving engine. Importing this package imports no torch; its modules that compute do."""
