"""One file a dialect: how a request is read and a reply written. No sockets here."""
