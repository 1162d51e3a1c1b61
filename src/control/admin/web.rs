//! The page at `/` and what it is made of. It needs nothing but this port, and reads `/status`.

use warp::http::{HeaderMap, HeaderValue, StatusCode, header};

use super::page::{Page, page};

/// A file of the page.
pub(super) struct File {
    /// Its path, without the `/` in front.
    pub(super) path: &'static str,
    content_type: &'static str,
    text: &'static str,
}

/// What a browser that opens the port gets.
pub(super) const INDEX: File = File {
    path: "",
    content_type: "text/html; charset=utf-8",
    text: include_str!("web/index.html"),
};

/// What that refers to.
pub(super) const FILES: &[File] = &[
    File {
        path: "page.css",
        content_type: "text/css; charset=utf-8",
        text: include_str!("web/page.css"),
    },
    File {
        path: "page.js",
        content_type: "text/javascript; charset=utf-8",
        text: include_str!("web/page.js"),
    },
];

/// What a browser may do with it: show it, and read from this port.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
    img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

impl File {
    /// The answer to who asks for it.
    pub(super) fn page(&self) -> Page {
        let mut page = page(StatusCode::OK, self.content_type, self.text.to_owned());
        for (name, value) in [
            (header::CONTENT_SECURITY_POLICY, POLICY),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::REFERRER_POLICY, "no-referrer"),
            // Another version may be on this port soon.
            (header::CACHE_CONTROL, "no-cache"),
            (header::VARY, "accept"),
        ] {
            page.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        page
    }
}

/// Whether these are the headers of a browser that opens a page; others get text.
pub(super) fn is_browser(headers: &HeaderMap) -> bool {
    let accepts = headers.get_all(header::ACCEPT).iter();
    accepts.filter_map(|accept| accept.to_str().ok()).any(|accept| accept.contains("text/html"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_small_and_asks_nobody_else() {
        let files: Vec<_> = FILES.iter().chain([&INDEX]).collect();
        let len: usize = files.iter().map(|file| file.text.len()).sum();
        assert!(len < 100_000, "{len} bytes");
        for file in files {
            // The name of a namespace is not an address that is fetched.
            let text = file.text.replace("http://www.w3.org/2000/svg", "");
            assert!(!text.contains("http://") && !text.contains("https://"), "{}", file.path);
            assert!(!text.contains("innerHTML"), "{}: text may be somebody else's", file.path);
        }
    }
}
