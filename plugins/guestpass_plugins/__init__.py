"""The plugins that come with Guestpass, one package a kind. They use `guestpass.plugin` and nothing else of ours."""
