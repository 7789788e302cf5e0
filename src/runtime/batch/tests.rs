use super::pages::Pages;

#[test]
fn a_page_is_free_when_its_last_sequence_gives_it_back() {
    let mut pages = Pages::new(2);
    let (a, b) = (pages.take().unwrap(), pages.take().unwrap());
    assert!(a != b && pages.take().is_none());
    pages.share(a);
    assert!(pages.is_shared(a) && !pages.is_shared(b));
    assert!(!pages.release(a) && !pages.is_shared(a));
    assert!(pages.release(a) && pages.free() == 1);
    assert_eq!(pages.take(), Some(a));
}
